"""Admission with a clock and costs of the test's own: no thread, no event loop, no model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from serving.errors import DeadlineExceeded, Draining, EngineDead, NotReady, Overloaded
from serving.online.admission import PACE_HALF_LIFE, WAIT_SAFETY_FACTOR, Admission, Demand, Job, Plan, State
from serving.online.costs import CostTable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ByRows:
    """A search of n rows takes 1 + n / 10 seconds, whatever its steps."""

    def estimate(self, steps: int, rows: int, share: float) -> float:
        return 1 + rows / 10


def make(clock: Clock | None = None, costs: Any = None, **bounds: float) -> Admission[str]:
    return Admission(
        costs or ByRows(), **{"max_batch": 10, "max_rows": 1000, "max_wait": 20.0, **bounds}, clock=clock or Clock()
    )  # type: ignore[arg-type]


def demand(beams: int = 1, variant: str = "a", deadline: float = math.inf) -> Demand:
    return Demand(0, beams, deadline, variant=variant)


def enter(admission: Admission[str], name: str, wanted: Demand) -> Job[str]:
    plan = admission.decide(wanted)
    assert plan is not None
    return admission.enter(name, plan, wanted.deadline)


def fill(admission: Admission[str], most: int, wanted: Demand) -> int:
    """Lets jobs in until one is refused, `most` at most. Returns how many there were."""
    for number in range(most):
        try:
            enter(admission, str(number), wanted)
        except Overloaded:
            return number
    return most


def run(admission: Admission[str], clock: Clock, slowdown: float = 1.0) -> list[str]:
    """Takes a batch and lets it run as long as it costs. Returns its jobs."""
    batch, _ = admission.take()
    if batch:
        clock.now += slowdown * ByRows().estimate(0, len(batch) * batch[0].plan.beam_width, 0.5)
        admission.finish()
    return [job.payload for job in batch]


def run_all(admission: Admission[str], clock: Clock, slowdown: float = 1.0) -> list[list[str]]:
    batches = []
    while batch := run(admission, clock, slowdown):
        batches.append(batch)
    return batches


# What shares a batch, and when it runs


def test_equal_plans_share_a_batch_and_the_oldest_job_is_always_in_the_next_one() -> None:
    clock = Clock()
    admission = make(clock, max_batch=2)
    for name, variant in map(tuple, ["1a", "2a", "3b", "4a", "5a"]):
        enter(admission, name, demand(variant=variant))
    first = run(admission, clock)
    enter(admission, "6", demand())
    assert [first, *run_all(admission, clock)] == [["1", "2"], ["3"], ["4", "5"], ["6"]]


def test_a_batch_is_bounded_by_jobs_and_by_rows() -> None:
    clock = Clock()
    admission = make(clock, max_batch=3, max_rows=25, max_wait=100.0)
    for name, beams in [("a", 10), ("b", 10), ("c", 10), ("d", 99)]:
        enter(admission, name, demand(beams))
    assert run_all(admission, clock) == [["a", "b"], ["c"], ["d"]]  # what is wider than the bound runs alone


def test_a_busy_plan_does_not_starve_a_rare_one() -> None:
    """Two plans keep the engine busy without a pause; a third comes now and then, alone."""
    clock = Clock()
    admission = make(clock, max_batch=4, max_wait=1e9)
    waited: list[int] = []
    for _ in range(8):
        enter(admission, "0", demand(variant="busy"))
    for turn in range(200):
        for variant in ["busy", "busy", "other"] + (["rare"] if turn % 10 == 0 else []):
            enter(admission, str(turn), demand(variant=variant))
        waited += [turn - int(came) for came in run(admission, clock)]
        assert admission.depth  # never idle
    assert max(waited) <= 5


def test_abandoned_and_expired_jobs_cost_no_compute() -> None:
    clock = Clock()
    admission = make(clock)
    enter(admission, "expired", demand(deadline=clock.now + 5))
    abandoned, left = enter(admission, "abandoned", demand()), enter(admission, "left", demand())
    enter(admission, "alive", demand(deadline=clock.now + 50))
    abandoned.abandoned = True
    admission.leave(left)
    admission.leave(left)  # twice is once
    assert admission.depth == 3
    clock.now += 10
    batch, dropped = admission.take()
    assert [job.payload for job in batch] == ["alive"]
    assert [job.payload for job in dropped] == ["expired", "abandoned"] and admission.depth == 0


def test_what_would_be_late_is_dropped_before_it_costs_compute() -> None:
    clock = Clock()
    admission = make(clock)
    soon = enter(admission, "soon", demand(10, deadline=clock.now + 2.5))
    enter(admission, "later", demand(10))
    batch, dropped = admission.take()  # together they take 3 s
    assert [job.payload for job in batch] == ["later"] and dropped == [soon]


def test_at_a_slow_pace_what_would_be_late_is_dropped_earlier() -> None:
    clock = Clock()
    admission = make(clock)
    enter(admission, "first", demand(10))
    run(admission, clock, slowdown=3.0)  # 6 s, not 2
    soon = admission.enter("soon", Plan(0, 10, "a"), clock.now + 5)
    enter(admission, "later", demand(10))
    batch, dropped = admission.take()
    assert [job.payload for job in batch] == ["later"] and dropped == [soon]


def test_clearing_returns_those_that_run_and_those_that_wait() -> None:
    admission = make(max_batch=1)
    for name in "ab":
        enter(admission, name, demand())
    admission.take()
    assert [job.payload for job in admission.clear()] == ["a", "b"]
    assert admission.depth == 0 and admission.expected_wait == 0


# The bound of the queue


def test_the_queue_is_bounded_by_work_not_by_count() -> None:
    clock = Clock()
    admission = make(clock, max_batch=100, max_wait=5.0)
    assert fill(admission, 30, demand()) == 30 and admission.expected_wait == 4.0  # one batch of 30 rows
    with pytest.raises(Overloaded) as overloaded:
        admission.decide(demand(50))  # one job of 50 rows
    assert overloaded.value.retry_after == 4.0
    enter(admission, "one more", demand())
    run_all(admission, clock)
    assert admission.decide(demand(500)) == Plan(0, 500, "a")  # an idle engine takes it


def test_many_waiting_cannot_exceed_the_bound() -> None:
    admission = make()
    assert fill(admission, 1000, demand()) == 100 and admission.expected_wait == 20.0  # ten batches of 2 s


def test_a_full_queue_refuses_everything_until_it_has_come_down() -> None:
    clock = Clock()
    admission = make(clock)
    admission.decide()
    fill(admission, 96, demand())
    admission.decide()  # nothing was refused yet
    with pytest.raises(Overloaded):
        admission.decide(demand(10, "b"))
    with pytest.raises(Overloaded) as overloaded:
        admission.decide()
    assert overloaded.value.retry_after == pytest.approx(19.6)
    clock.now += 1.5  # 18.1 s are left, of 20
    with pytest.raises(Overloaded):
        admission.decide()
    clock.now += 0.2
    admission.decide()
    clock.now -= 0.2
    while admission.take()[0]:  # faster than predicted
        admission.finish()
    admission.decide()


def test_a_large_job_that_finds_no_room_does_not_keep_out_small_ones() -> None:
    admission = make()
    fill(admission, 80, demand())
    with pytest.raises(Overloaded):
        admission.decide(demand(50, "b"))
    admission.decide()
    enter(admission, "small", demand())


def test_the_queue_is_bounded_by_the_time_that_work_takes_now() -> None:
    """Batches come to take three times as long as they used to, and then as long as before."""
    clock = Clock()
    admission = make(clock)

    def full(slowdown: float) -> int:
        """How many jobs find room."""
        depth = fill(admission, 200, demand())
        run_all(admission, clock, slowdown)
        return depth

    assert full(3.0) == 100  # ten batches of 2 s
    assert full(3.0) == 30  # three of 6 s, and no room for a fourth
    fill(admission, 10, demand())
    assert admission.expected_wait == pytest.approx(6.0, rel=0.05)
    run_all(admission, clock, 1.0)
    for _ in range(2):
        full(1.0)
    assert 98 <= full(1.0) <= 100


def test_a_single_stall_makes_no_slow_pace() -> None:
    clock = Clock()

    class Short:
        def estimate(self, steps: int, rows: int, share: float) -> float:
            return 0.05

    admission = make(clock, Short(), max_batch=4, max_wait=10.0)
    for stall in [0.0] * 20 + [3.0]:
        enter(admission, "a", demand())
        admission.take()
        clock.now += 0.05 + stall
        admission.finish()
    fill(admission, 40, demand())  # ten batches, 0.5 s
    assert admission.expected_wait < 1.0


def test_the_pace_is_forgotten_when_nothing_runs() -> None:
    clock = Clock()
    admission = make(clock)
    for _ in range(2):
        enter(admission, "slow", demand(10))
        run(admission, clock, slowdown=3.0)
    clock.now += 20 * PACE_HALF_LIFE
    enter(admission, "later", demand(10))
    assert admission.expected_wait == pytest.approx(2.0, rel=0.01)


def test_the_wait_counts_down_while_a_batch_runs_and_no_further_than_to_nothing() -> None:
    clock = Clock()
    admission = make(clock)
    enter(admission, "a", demand(10))
    admission.take()
    assert admission.expected_wait == 2.0
    clock.now += 0.5
    assert admission.expected_wait == 1.5
    clock.now += 60
    assert admission.expected_wait == 0.0


# Deadlines and plans


def measured(clock: Clock) -> CostTable:
    """0..4 steps at 50 rows take 10, 20, 30, 40, 50 ms, at 20 rows half of that, at 400 rows four times."""
    table = CostTable(clock)
    for steps in range(5):
        for rows, factor in ((20, 0.5), (50, 1), (400, 4)):
            table.observe(steps, rows, 0.01 * (steps + 1) * factor)
    return table


def flexible(clock: Clock, seconds: float, steps: int = 4, beams: int = 50, least: int = 20) -> Demand:
    return Demand(steps, beams, clock.now + seconds, flexible=True, min_beam_width=least)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0051, (0, 20)), (0.0151, (0, 50)), (0.0301, (2, 50)), (0.0451, (3, 50)), (1.0, (4, 50))],
)
def test_a_flexible_demand_gets_the_largest_plan_in_time(seconds: float, expected: tuple[int, int]) -> None:
    clock = Clock()
    assert make(clock, measured(clock)).decide(flexible(clock, seconds)) == Plan(*expected)


def test_no_more_steps_than_wanted_and_no_beams_below_the_least() -> None:
    clock = Clock()
    admission = make(clock, measured(clock))
    assert admission.decide(flexible(clock, 1.0, steps=2)) == Plan(2, 50)
    with pytest.raises(DeadlineExceeded):
        admission.decide(flexible(clock, 0.006, least=50))
    plans = [plan[:2] for plan in flexible(clock, 1.0, steps=1).plans()]
    assert plans == [(1, 50), (0, 50), (1, 25), (0, 25), (1, 20), (0, 20)]


def test_a_fixed_demand_gets_its_plan_or_a_refusal() -> None:
    clock = Clock()
    admission = make(clock, measured(clock))
    wanted = Demand(3, 50, clock.now + 0.041)
    assert admission.decide(wanted) == Plan(3, 50)
    with pytest.raises(DeadlineExceeded, match="budget"):
        admission.decide(replace(wanted, deadline=clock.now + 0.039))
    with pytest.raises(DeadlineExceeded, match="used up"):
        admission.decide(replace(wanted, deadline=clock.now))


def test_the_wait_ahead_counts_against_the_deadline_with_a_margin() -> None:
    clock = Clock()
    admission = make(clock, measured(clock))
    enter(admission, "other", Demand(0, 400, variant="other"))  # 40 ms
    wait = 0.04 * WAIT_SAFETY_FACTOR
    assert admission.decide(flexible(clock, wait + 0.0301)) == Plan(2, 50)
    assert admission.decide(Demand(2, 50, clock.now + wait + 0.0301)) == Plan(2, 50)
    for wanted in (Demand(2, 50, clock.now + wait + 0.0299), flexible(clock, wait, least=50)):
        with pytest.raises(Overloaded, match="too long for this time budget") as overloaded:
            admission.decide(wanted)  # an idle engine could
        assert overloaded.value.retry_after == pytest.approx(0.05)
    with pytest.raises(DeadlineExceeded):
        admission.decide(Demand(2, 50, clock.now + 0.02))  # not even an idle engine could


def test_batch_mates_make_the_batch_longer() -> None:
    """Seven searches of 50 beams and 3 steps wait: an eighth makes a batch of 400 rows, and nothing is ahead of it."""
    clock = Clock()
    admission = make(clock, measured(clock))
    for _ in range(7):
        enter(admission, "mate", Demand(3, 50))
    assert admission.decide(Demand(3, 50, clock.now + 0.161)) == Plan(3, 50)
    with pytest.raises(Overloaded):
        admission.decide(Demand(3, 50, clock.now + 0.159))


def test_a_deadline_needs_the_p95_unless_the_engine_is_idle_and_the_plan_fixed() -> None:
    clock = Clock()
    table = CostTable(clock)
    for number in range(20):
        table.observe(0, 50, 0.5 if number % 10 == 0 else 0.01)
    admission = make(clock, table)
    assert admission.decide(Demand(0, 50, clock.now + 0.1)) == Plan(0, 50)
    with pytest.raises(DeadlineExceeded):
        admission.decide(flexible(clock, 0.1, steps=0, least=50))
    enter(admission, "other", Demand(0, 50, variant="other"))
    with pytest.raises(Overloaded):
        admission.decide(Demand(0, 50, clock.now + 0.1))


def test_a_flexible_demand_shrinks_to_what_the_queue_has_room_for() -> None:
    clock = Clock()
    admission = make(clock, measured(clock), max_batch=1, max_wait=0.1)
    for _ in range(3):
        enter(admission, "other", Demand(2, 50))  # 30 ms each, 90 in all
    with pytest.raises(Overloaded, match="full"):
        admission.decide(Demand(4, 50))
    assert admission.decide(flexible(clock, 10.0)) == Plan(0, 50)


# The service's state


@pytest.mark.parametrize(
    ("state", "error"),
    [("loading", NotReady), ("warming", NotReady), ("draining", Draining), ("engine dead", EngineDead)],
)
def test_nothing_enters_unless_the_service_is_ready(state: State, error: type[Exception]) -> None:
    admission = Admission[str](ByRows(), max_batch=1, max_rows=1, max_wait=1.0, state=state)
    for wanted in (None, demand()):
        with pytest.raises(error):
            admission.decide(wanted)


def test_the_state_never_goes_back() -> None:
    admission = Admission[str](ByRows(), max_batch=1, max_rows=1, max_wait=1.0, state="loading")
    for state, expected in [("draining", "draining"), ("ready", "draining"), ("engine dead", "engine dead")]:
        admission.advance(state)  # type: ignore[arg-type]
        assert admission.state == expected
