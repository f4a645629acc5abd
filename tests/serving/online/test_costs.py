"""The cost table with a clock of the test's."""

from __future__ import annotations

import threading

import pytest

from serving.online.costs import BEST_HALF_LIFE, HALF_LIFE, MAX_ENTRIES, TYPICAL, WINDOW, CostTable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def measured() -> tuple[CostTable, Clock]:
    """0..4 steps at 50 rows take 10, 20, 30, 40, 50 ms, at 20 rows half of that, at 400 rows four times."""
    clock = Clock()
    table = CostTable(clock)
    for steps in range(5):
        for rows, factor in ((20, 0.5), (50, 1), (400, 4)):
            table.observe(steps, rows, 0.01 * (steps + 1) * factor)
    return table, clock


def test_the_p95_counts_where_a_deadline_does_and_the_median_where_a_queue_does() -> None:
    table = CostTable(Clock())
    for i in range(WINDOW):
        table.observe(0, 50, 0.5 if i % 10 == 0 else 0.01)
    assert table.estimate(0, 50) == 0.5
    assert table.estimate(0, 50, TYPICAL) == 0.01


def test_only_the_newest_runs_count() -> None:
    table = CostTable(Clock())
    for seconds in [0.5] * WINDOW + [0.01] * WINDOW:
        table.observe(0, 50, seconds)
    assert table.estimate(0, 50) == 0.01


def test_an_unmeasured_shape_is_taken_for_no_cheaper_than_it_is() -> None:
    table, _ = measured()
    assert table.estimate(0, 60) == pytest.approx(0.04)  # as 400 rows
    assert table.estimate(0, 10) == pytest.approx(0.005)  # as 20 rows
    assert table.estimate(0, 800) == pytest.approx(0.08)  # twice 400 rows
    assert table.estimate(7, 50) == pytest.approx(0.05)  # as 4 steps
    assert CostTable(Clock()).estimate(2, 50) == 0.0  # nothing known: try


def test_steps_that_no_batch_was_measured_of_count_as_the_next_more_that_were() -> None:
    table, _ = measured()
    table.observe(7, 50, 0.08)
    table.observe(7, 1600, 1.0)
    table.observe(9, 1600, 0.9)
    assert table.estimate(6, 50) == pytest.approx(0.08)  # as 7 steps
    assert table.estimate(2, 1600) == pytest.approx(0.9)  # as 9 steps
    assert table.estimate(7, 60) == pytest.approx(0.9)
    assert table.estimate(9, 3200) == pytest.approx(1.8)
    assert table.estimate(5, 3200) == pytest.approx(2.0)  # as 7 steps, the next more, twice


def test_a_slow_estimate_fades_so_that_it_is_tried_again() -> None:
    table, clock = measured()
    table.observe(4, 50, 5.0)
    assert table.estimate(4, 50) == 5.0
    clock.now += 7 * HALF_LIFE
    assert table.estimate(4, 50) == pytest.approx(5.0 / 2**7)


def test_after_an_idle_time_an_estimate_is_still_close_to_the_fastest_run() -> None:
    table, clock = measured()
    clock.now += BEST_HALF_LIFE
    assert table.estimate(4, 50) == pytest.approx(0.025)


def test_the_table_is_bounded_and_forgets_what_was_not_measured_for_longest() -> None:
    table, clock = measured()
    for rows in range(1000, 1000 + 2 * MAX_ENTRIES):
        clock.now += 1
        table.observe(0, rows, 1.0)
    rows = [entry["beam_rows"] for entry in table.table() if entry["reasoning_steps"] == 0]
    assert len(rows) == MAX_ENTRIES and max(rows) == 999 + 2 * MAX_ENTRIES and 50 not in rows


def test_the_table_says_what_was_measured() -> None:
    table, _ = measured()
    assert table.table()[4] == {
        "reasoning_steps": 1, "beam_rows": 50, "median_ms": 20.0, "p95_ms": 20.0, "runs": 1,
    }  # fmt: skip


def test_one_thread_may_measure_while_another_asks() -> None:
    table = CostTable()
    stop = threading.Event()
    faults: list[BaseException] = []

    def observe() -> None:
        try:
            for i in range(20_000):
                table.observe(i % 5, 1 + i % 300, 0.01)
        except BaseException as error:
            faults.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=observe)
    thread.start()
    while not stop.is_set():
        assert table.estimate(2, 77) in (0.0, pytest.approx(0.01, rel=2))
        table.table()
    thread.join()
    assert not faults
