"""The planner with a clock of the test's."""

from __future__ import annotations

import pytest

from serving.planner import HALF_LIFE, WINDOW, Planner


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def measured() -> tuple[Planner, Clock]:
    """0..4 steps at beam 50 take 10, 20, 30, 40, 50 ms."""
    clock = Clock()
    planner = Planner(tokens_per_item=4, clock=clock)
    for steps in range(5):
        planner.observe(steps, 50, 0.01 * (steps + 1))
    return planner, clock


@pytest.mark.parametrize(("seconds", "expected"), [(0.005, None), (0.015, 0), (0.03, 2), (0.045, 3), (1.0, 4)])
def test_the_largest_number_of_steps_that_fits_is_chosen(seconds: float, expected: int | None) -> None:
    planner, _ = measured()
    assert planner.choose(seconds, 50, 4) == expected


def test_no_more_steps_than_allowed() -> None:
    planner, _ = measured()
    assert planner.choose(1.0, 50, 2) == 2


def test_the_p95_counts_not_the_mean() -> None:
    planner = Planner(4, Clock())
    for i in range(WINDOW):
        planner.observe(0, 50, 0.5 if i % 10 == 0 else 0.01)
    assert planner.estimate(0, 50) == 0.5


def test_an_unmeasured_shape_is_scaled_by_its_work() -> None:
    planner = Planner(4, Clock())
    planner.observe(0, 50, 0.01)
    assert planner.estimate(4, 100) == pytest.approx(0.04)


def test_a_slow_estimate_fades_so_that_it_is_tried_again() -> None:
    planner, clock = measured()
    planner.observe(4, 50, 5.0)
    assert planner.choose(0.1, 50, 4) == 3
    clock.now += 7 * HALF_LIFE
    assert planner.choose(0.1, 50, 4) == 4


def test_hopeless_only_if_even_the_fastest_run_would_not_fit() -> None:
    planner, _ = measured()
    planner.observe(2, 50, 0.2)
    assert not planner.hopeless(0.05, 2, 50)
    assert planner.hopeless(0.01, 2, 50)
    assert not planner.hopeless(0.0001, 2, 77)  # never measured: try
