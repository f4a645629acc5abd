"""The planner with a clock of the test's."""

from __future__ import annotations

import threading

import pytest

from serving.online.planner import BEST_HALF_LIFE, ENTRIES, HALF_LIFE, TYPICAL, WINDOW, Planner


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def idle(steps: int, beam_width: int) -> tuple[float, int]:
    """Nothing ahead, nothing beside."""
    return 0.0, 0


def measured() -> tuple[Planner, Clock]:
    """0..4 steps at 50 rows take 10, 20, 30, 40, 50 ms, at 20 rows half of that, at 400 rows four times."""
    clock = Clock()
    planner = Planner(clock)
    for steps in range(5):
        for rows, factor in ((20, 0.5), (50, 1), (400, 4)):
            planner.observe(steps, rows, 0.01 * (steps + 1) * factor)
    return planner, clock


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.004, None), (0.005, (0, 20)), (0.015, (0, 50)), (0.03, (2, 50)), (0.045, (3, 50)), (1.0, (4, 50))],
)
def test_the_largest_steps_and_beams_that_fit_are_chosen(seconds: float, expected: tuple[int, int] | None) -> None:
    planner, _ = measured()
    assert planner.choose(seconds, idle, 4, (50, 20)) == expected


def test_no_more_steps_than_allowed_and_no_beams_but_those_offered() -> None:
    planner, _ = measured()
    assert planner.choose(1.0, idle, 2, (50, 20)) == (2, 50)
    assert planner.choose(0.006, idle, 4, (50,)) is None


def test_what_is_ahead_in_the_queue_counts() -> None:
    planner, _ = measured()
    assert planner.choose(0.05, lambda steps, beam: (0.02, 0), 4, (50,)) == (2, 50)
    # a batch of 8 such searches takes four times as long, and this one would be its last
    assert planner.choose(0.09, lambda steps, beam: (0.0, 350), 4, (50,)) == (1, 50)
    # only what has 3 steps queues, the others start at once
    assert planner.choose(0.045, lambda steps, beam: (1.0 if steps == 3 else 0.0, 0), 4, (50,)) == (2, 50)


def test_the_p95_counts_where_a_deadline_does_and_the_median_where_a_queue_does() -> None:
    planner = Planner(Clock())
    for i in range(WINDOW):
        planner.observe(0, 50, 0.5 if i % 10 == 0 else 0.01)
    assert planner.estimate(0, 50) == 0.5
    assert planner.estimate(0, 50, TYPICAL) == 0.01


def test_only_the_newest_runs_count() -> None:
    planner = Planner(Clock())
    for seconds in [0.5] * WINDOW + [0.01] * WINDOW:
        planner.observe(0, 50, seconds)
    assert planner.estimate(0, 50) == 0.01


def test_an_unmeasured_shape_is_taken_for_no_cheaper_than_it_is() -> None:
    planner, _ = measured()
    assert planner.estimate(0, 60) == pytest.approx(0.04)  # as 400 rows
    assert planner.estimate(0, 10) == pytest.approx(0.005)  # as 20 rows
    assert planner.estimate(0, 800) == pytest.approx(0.08)  # twice 400 rows
    assert planner.estimate(7, 50) == pytest.approx(0.05)  # as 4 steps
    assert Planner(Clock()).estimate(2, 50) == 0.0  # nothing known: try


def test_a_slow_estimate_fades_so_that_it_is_tried_again() -> None:
    planner, clock = measured()
    planner.observe(4, 50, 5.0)
    assert planner.choose(0.1, idle, 4, (50,)) == (3, 50)
    clock.now += 7 * HALF_LIFE
    assert planner.choose(0.1, idle, 4, (50,)) == (4, 50)


def test_after_an_idle_time_an_estimate_is_still_close_to_the_fastest_run() -> None:
    planner, clock = measured()
    clock.now += BEST_HALF_LIFE
    assert planner.estimate(4, 50) == pytest.approx(0.025)


def test_the_table_is_bounded_and_forgets_what_was_not_measured_for_longest() -> None:
    planner, clock = measured()
    for rows in range(1000, 1000 + 2 * ENTRIES):
        clock.now += 1
        planner.observe(0, rows, 1.0)
    rows = [entry["beam_rows"] for entry in planner.table() if entry["reasoning_steps"] == 0]
    assert len(rows) == ENTRIES and max(rows) == 999 + 2 * ENTRIES and 50 not in rows


def test_the_table_says_what_was_measured() -> None:
    planner, _ = measured()
    assert planner.table()[4] == {
        "reasoning_steps": 1, "beam_rows": 50, "median_ms": 20.0, "p95_ms": 20.0, "runs": 1,
    }  # fmt: skip


def test_one_thread_may_measure_while_another_asks() -> None:
    planner = Planner()
    stop = threading.Event()
    faults: list[BaseException] = []

    def observe() -> None:
        try:
            for i in range(20_000):
                planner.observe(i % 5, 1 + i % 300, 0.01)
        except BaseException as error:
            faults.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=observe)
    thread.start()
    while not stop.is_set():
        assert planner.estimate(2, 77) in (0.0, pytest.approx(0.01, rel=2))
        planner.table()
    thread.join()
    assert not faults
