"""Admission with a clock and costs of the test's own: no thread, no event loop, no model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from serving.errors import DeadlineExceeded, Draining, EngineDead, NotReady, Overloaded
from serving.online.admission import (
    ACTIVE_FOR,
    ESTIMATES_KEPT_S,
    PACE_HALF_LIFE,
    PATIENCE_S,
    WAIT_SAFETY_FACTOR,
    Admission,
    Demand,
    Job,
    Plan,
    State,
)
from serving.online.costs import CostTable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ByRows:
    """A search of n rows takes 1 + n / 10 seconds, whatever its steps."""

    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return 1 + rows / 10


def make(clock: Clock | None = None, costs: Any = None, **bounds: float) -> Admission[str]:
    return Admission(
        costs or ByRows(), **{"max_batch": 10, "max_rows": 1000, "max_wait": 20.0, **bounds}, clock=clock or Clock()
    )  # type: ignore[arg-type]


def demand(beams: int = 1, variant: str = "a", deadline: float = math.inf, client: str | None = None) -> Demand:
    return Demand(0, beams, deadline, variant=variant, client=client)


def enter(admission: Admission[str], name: str, wanted: Demand) -> Job[str]:
    plan = admission.decide(wanted)
    assert plan is not None
    return admission.enter(name, plan, wanted.deadline, wanted.client)


def fill(admission: Admission[str], most: int, wanted: Demand) -> int:
    """Lets jobs in until one is refused, `most` at most. Returns how many there were."""
    for number in range(most):
        try:
            enter(admission, str(number), wanted)
        except Overloaded:
            return number
    return most


def expected_wait(admission: Admission[str]) -> float:
    """Seconds until everything that waits and runs is done."""
    waiting = {plan: len(group) for plan, group in admission._waiting.items()}
    return admission._seconds_of(waiting, admission._pace())


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


def test_a_request_of_two_searches_costs_and_fills_a_batch_like_two() -> None:
    admission = make(Clock(), max_batch=10, max_rows=40, max_wait=100.0)
    assert fill(admission, 4, replace(demand(10), searches=2)) == 4
    assert expected_wait(admission) == 2 * (1 + 40 / 10)  # two batches of two jobs, 20 rows each


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
    assert admission.depth == 0 and expected_wait(admission) == 0


# The bound of the queue


def test_the_queue_is_bounded_by_work_not_by_count() -> None:
    clock = Clock()
    admission = make(clock, max_batch=100, max_wait=5.0)
    assert fill(admission, 30, demand()) == 30 and expected_wait(admission) == 4.0  # one batch of 30 rows
    with pytest.raises(Overloaded) as overloaded:
        admission.decide(demand(50))  # one job of 50 rows
    assert overloaded.value.retry_after == 4.0
    enter(admission, "one more", demand())
    run_all(admission, clock)
    assert admission.decide(demand(500)) == Plan(0, 500, "a")  # an idle engine takes it


def test_many_waiting_cannot_exceed_the_bound() -> None:
    admission = make()
    assert fill(admission, 1000, demand()) == 100 and expected_wait(admission) == 20.0  # ten batches of 2 s


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


def test_a_queue_that_seemed_long_in_a_slow_moment_is_not_closed_for_long() -> None:
    clock = Clock()
    admission = make(clock)
    fill(admission, 100, demand())
    run(admission, clock, slowdown=4.0)
    with pytest.raises(Overloaded) as overloaded:
        admission.decide(demand())
    assert overloaded.value.retry_after > 60  # 18 s of work, at that pace
    with pytest.raises(Overloaded):
        admission.decide()
    clock.now += 2.1  # a tenth of the bound
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
    assert expected_wait(admission) == pytest.approx(6.0, rel=0.05)
    run_all(admission, clock, 1.0)
    for _ in range(2):
        full(1.0)
    assert 98 <= full(1.0) <= 100


def test_a_single_stall_makes_no_slow_pace() -> None:
    clock = Clock()

    class Short:
        def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
            return 0.05

    admission = make(clock, Short(), max_batch=4, max_wait=10.0)
    for stall in [0.0] * 20 + [3.0]:
        enter(admission, "a", demand())
        admission.take()
        clock.now += 0.05 + stall
        admission.finish()
    fill(admission, 40, demand())  # ten batches, 0.5 s
    assert expected_wait(admission) < 1.0


def test_the_pace_is_forgotten_when_nothing_runs() -> None:
    clock = Clock()
    admission = make(clock)
    for _ in range(2):
        enter(admission, "slow", demand(10))
        run(admission, clock, slowdown=3.0)
    clock.now += 20 * PACE_HALF_LIFE
    enter(admission, "later", demand(10))
    assert expected_wait(admission) == pytest.approx(2.0, rel=0.01)


def test_the_wait_counts_down_while_a_batch_runs_and_no_further_than_to_nothing() -> None:
    clock = Clock()
    admission = make(clock)
    enter(admission, "a", demand(10))
    admission.take()
    assert expected_wait(admission) == 2.0
    clock.now += 0.5
    assert expected_wait(admission) == 1.5
    clock.now += 60
    assert expected_wait(admission) == 0.0


# Several clients

SHORT = 0.009  # seconds of a search of one row; ten times that of a full batch of ten


class Short:
    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return SHORT * rows


def short(clock: Clock, **bounds: float) -> Admission[str]:
    return make(clock, Short(), **{"max_wait": 0.905, **bounds})


def run_short(admission: Admission[str], clock: Clock) -> list[Job[str]]:
    batch, _ = admission.take()
    clock.now += sum(SHORT * job.plan.beam_width for job in batch)
    admission.finish()
    return batch


def test_a_client_with_a_long_queue_delays_another_by_a_batch_and_keeps_nobody_out() -> None:
    clock = Clock()
    admission = short(clock)
    assert fill(admission, 1000, demand(client="heavy")) == 100  # the whole queue, with nobody else around
    run_short(admission, clock)
    enter(admission, "light", demand(client="light"))
    with pytest.raises(Overloaded):
        fill(admission, 1000, demand(client="heavy"))
        admission.decide(client="heavy")
    admission.decide(client="light")
    admission.decide(client="somebody new")
    assert [job.client for job in run_short(admission, clock)].count("light") == 1
    assert admission.depth > 80


def test_clients_get_equal_shares_of_the_engine_whatever_they_ask_for() -> None:
    """One asks for four times as wide searches, one keeps ten times as many waiting, one has a plan of its own."""
    clock = Clock()
    admission = short(clock, max_wait=100.0)
    kinds = {
        "wide": (demand(4, client="wide"), 5),
        "many": (demand(1, client="many"), 50),
        "other": (demand(1, "b", client="other"), 5),
    }
    waiting, seconds = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    for _ in range(300):
        for name, (wanted, most) in kinds.items():
            while waiting[name] < most:
                enter(admission, name, wanted)
                waiting[name] += 1
        for job in run_short(admission, clock):
            waiting[job.payload] -= 1
            seconds[job.payload] += SHORT * job.plan.beam_width
    assert max(seconds.values()) < 1.15 * min(seconds.values()), seconds


def test_what_a_client_was_given_while_alone_is_not_held_against_it() -> None:
    clock = Clock()
    admission = short(clock)
    for _ in range(50):
        enter(admission, "first", demand(client="first"))
        run_short(admission, clock)
    for name in ("first", "second") * 10:
        enter(admission, name, demand(client=name))
    assert abs([job.client for job in run_short(admission, clock)].count("first") - 5) <= 1


def test_what_leaves_before_it_runs_costs_its_client_nothing() -> None:
    clock = Clock()
    admission = short(clock, max_batch=1)
    enter(admission, "other", demand(client="other"))
    for job in [enter(admission, "gone", demand(client="mine")) for _ in range(20)]:
        admission.leave(job)
    enter(admission, "mine", demand(client="mine"))
    enter(admission, "other 2", demand(client="other"))
    late = admission.enter("late", Plan(0, 1, "a"), clock.now + SHORT / 2, "third")
    enter(admission, "third", demand(client="third"))
    order = [job.payload for batch in iter(lambda: run_short(admission, clock), []) for job in batch]
    assert order == ["other", "mine", "other 2", "third"] and not late.waiting


def test_one_client_is_served_in_the_order_of_arrival_whatever_leaves() -> None:
    clock = Clock()
    admission = short(clock, max_batch=1)
    jobs = [enter(admission, f"{number}", demand(1 + number % 3, f"{number % 2}", client="a")) for number in range(9)]
    for number in (2, 3, 4, 7):
        admission.leave(jobs[number])
    enter(admission, "9", demand(client="a"))
    order = [job.payload for batch in iter(lambda: run_short(admission, clock), []) for job in batch]
    assert order == ["0", "1", "5", "6", "8", "9"]


@pytest.mark.parametrize("beams", [2, 3])
def test_a_batch_holds_little_of_one_client_while_a_light_one_is_active(beams: int) -> None:
    clock = Clock()
    admission = short(clock)
    enter(admission, "light", demand(beams, client="light"))
    run_short(admission, clock)
    fill(admission, 60, demand(client="heavy"))
    assert len(run_short(admission, clock)) == beams  # as much as the light one's next request
    enter(admission, "third", demand(client="third"))
    enter(admission, "light", demand(client="light"))
    assert [job.client for job in run_short(admission, clock)].count("heavy") == 1
    clock.now += ACTIVE_FOR + 0.1
    run_short(admission, clock)  # after it, they are forgotten
    assert len(run_short(admission, clock)) == 10


def test_a_batch_holds_as_much_of_others_as_a_light_client_has_waiting() -> None:
    clock = Clock()
    admission = short(clock)
    for _ in range(3):
        enter(admission, "light", demand(client="light"))
    fill(admission, 60, demand(client="heavy"))
    assert sorted(job.client for job in run_short(admission, clock)) == ["heavy"] * 3 + ["light"] * 3
    enter(admission, "light", demand(client="light"))
    enter(admission, "third", demand(client="third"))  # asks for less
    assert [job.client for job in run_short(admission, clock)].count("heavy") == 1


class SmallBatchesCostMore:
    """One row takes 11 ms, ten take 20."""

    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return 0.010 + 0.001 * rows


def test_beside_a_light_client_a_heavy_ones_wait_is_what_runs_before_its_turn() -> None:
    """Each batch holds one job of either, while ten of the heavy client would fill it. Its queue is always full."""
    clock, costs = Clock(), SmallBatchesCostMore()
    admission = make(clock, costs, max_wait=0.5)
    since = clock.now
    refused: list[tuple[float, float]] = []  # when, and the wait that was named
    waits: list[tuple[float, float]] = []
    late = 0
    while clock.now < since + 10:
        if not any(job.client == "light" for group in admission._waiting.values() for job in group.values()):
            enter(admission, "light", demand(client="light"))
        for _ in range(3):
            try:
                enter(admission, "heavy", demand(client="heavy", deadline=clock.now + 1.0))
            except Overloaded as error:
                refused.append((clock.now, error.retry_after))
        batch, dropped = admission.take()
        late += len(dropped) if clock.now > since + 2 else 0
        waits += [(job.since, clock.now - job.since) for job in batch if job.client == "heavy"]
        clock.now += costs.estimate(0, len(batch), 0.5)
        admission.finish()
    assert late == 0
    settled = [(at, named) for at, named in refused if since + 3 < at < since + 8]
    assert len(settled) > 100
    for at, named in settled:
        wait = next(wait for entered, wait in waits if entered >= at)
        assert abs(named - wait) < 0.1, (at, named, wait)
    soon = demand(client="heavy", deadline=clock.now + 0.6)
    with pytest.raises(Overloaded, match="full"):  # longer than the bound, and later than its deadline
        admission.decide(soon)
    with pytest.raises(Overloaded):
        admission.decide(client="heavy")  # and so are the next ones, at once
    admission.decide(client="light")
    assert admission.decide(replace(soon, deadline=clock.now + 5)) is not None  # there is room for one that can wait


def test_clients_that_all_keep_the_queue_filled_share_full_batches() -> None:
    clock = Clock()
    admission = short(clock)
    for _ in range(20):
        for name in "ab":
            enter(admission, name, demand(client=name))
    batch = [job.payload for job in run_short(admission, clock)]
    assert len(batch) == 10 and batch.count("a") == 5


def test_the_engine_waits_a_moment_for_a_client_that_has_just_been_answered() -> None:
    clock = Clock()
    admission = short(clock)
    enter(admission, "light", demand(client="light"))
    fill(admission, 20, demand(client="heavy"))
    assert admission.patience() <= 0  # nobody was answered yet
    run_short(admission, clock)
    assert admission.patience() == pytest.approx(PATIENCE_S)
    clock.now += PATIENCE_S + 1e-6
    assert admission.patience() <= 0
    run_short(admission, clock)
    assert admission.patience() <= 0  # a batch of those who wait anyway
    enter(admission, "light", demand(client="light"))
    run_short(admission, clock)
    enter(admission, "light", demand(client="light"))
    assert admission.patience() <= 0  # it is back


def test_the_engine_waits_for_nobody_where_one_client_is_alone_or_nobody_keeps_a_queue() -> None:
    clock = Clock()
    admission = short(clock)
    fill(admission, 30, demand(client="a"))
    run_short(admission, clock)
    assert admission.patience() <= 0
    admission = short(clock, max_batch=2)
    for number in range(6):  # a connection each, and every one waits for its answer
        enter(admission, "", demand(client=f"{number}"))
    run_short(admission, clock)
    assert admission.patience() <= 0


def test_a_pause_is_short_beside_what_would_run_instead() -> None:
    clock = Clock()

    class Fast:
        def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
            return 0.0004 * rows

    admission = make(clock, Fast())
    enter(admission, "light", demand(client="light"))
    fill(admission, 20, demand(client="heavy"))
    admission.take()
    clock.now += 0.0008
    admission.finish()
    assert 0 < admission.patience() <= 0.00021


def test_a_search_longer_than_a_shared_batch_runs_alone() -> None:
    clock = Clock()
    admission = short(clock)
    enter(admission, "light", demand(client="light"))
    for _ in range(3):
        enter(admission, "wide", demand(30, client="heavy"))
    batches = [[job.payload for job in run_short(admission, clock)] for _ in range(4)]
    assert sorted(batches) == [["light"], ["wide"], ["wide"], ["wide"]]


def test_a_deadline_is_held_against_what_runs_before_and_not_against_the_whole_queue() -> None:
    clock = Clock()
    admission = short(clock)
    enter(admission, "heavy", demand(client="heavy"))
    fill(admission, 90, demand(client="heavy"))
    soon = clock.now + 0.3
    with pytest.raises(Overloaded, match="too long for this time budget"):
        admission.decide(demand(deadline=soon, client="heavy"))
    enter(admission, "light", demand(deadline=soon, client="light"))
    assert "light" in [job.payload for job in run_short(admission, clock)]


def test_many_new_clients_find_a_bounded_queue_and_are_turned_away_at_once() -> None:
    clock = Clock()
    admission = short(clock)
    entered = 0
    with pytest.raises(Overloaded):
        for number in range(1000):
            enter(admission, "", demand(client=f"{number}"))
            entered += 1
    assert entered == 100 and expected_wait(admission) == pytest.approx(0.9)
    with pytest.raises(Overloaded):
        admission.decide(client="yet another")
    admission.decide(client="7")  # has a flow, and is asked for its demand


def test_clients_that_have_gone_are_forgotten() -> None:
    clock = Clock()
    admission = short(clock)
    for number in range(200):
        clock.now += 0.1
        enter(admission, "", demand(client=f"{number}"))
        run_short(admission, clock)
    assert len(admission._flows) <= 12


# Deadlines and plans


def measured(clock: Clock) -> CostTable:
    """0..4 steps at 50 rows take 10, 20, 30, 40, 50 ms, at 20 rows half of that, at 400 rows four times."""
    table = CostTable(clock)
    for steps in range(5):
        for rows, factor in ((20, 0.5), (50, 1), (400, 4)):
            table.observe(steps, rows, 0.01 * (steps + 1) * factor)
    return table


def flexible(clock: Clock, seconds: float, steps: int = 4, beams: int = 50, least: int = 20) -> Demand:
    fewer = range(steps - 1, -1, -1)
    return Demand(steps, beams, clock.now + seconds, flexible=True, fewer=fewer, min_beam_width=least)


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


def test_only_the_numbers_of_steps_that_a_demand_accepts_are_tried() -> None:
    clock = Clock()
    admission = make(clock, measured(clock))

    def decide(seconds: float) -> Plan | None:
        return admission.decide(Demand(3, 50, clock.now + seconds, flexible=True, fewer=(1, 0), min_beam_width=50))

    assert [decide(seconds) for seconds in (0.041, 0.039, 0.019)] == [Plan(3, 50), Plan(1, 50), Plan(0, 50)]


def test_what_names_no_least_width_is_never_searched_with_none() -> None:
    assert [plan.beam_width for plan in Demand(0, 5, flexible=True).plans()] == [5, 2, 1]
    assert [plan.beam_width for plan in Demand(0, 1, flexible=True).plans()] == [1]


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
    [
        ("loading", NotReady),
        ("warming", NotReady),
        ("replaying", NotReady),
        ("draining", Draining),
        ("engine dead", EngineDead),
    ],
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


class Changing:
    """What a search takes is changed by the test."""

    seconds = 1.0

    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return self.seconds


def test_estimates_are_kept_for_a_while_and_no_longer() -> None:
    clock, costs = Clock(), Changing()
    admission = make(clock, costs, max_batch=1)

    def cost_after_a_batch() -> float:
        admission.take()
        admission.finish()
        return enter(admission, "next", demand()).cost

    assert cost_after_a_batch() == 1.0
    costs.seconds = 2.0
    clock.now += ESTIMATES_KEPT_S / 2
    assert cost_after_a_batch() == 1.0
    clock.now += ESTIMATES_KEPT_S
    assert cost_after_a_batch() == 2.0


def test_an_estimate_that_refuses_is_made_again_though_no_batch_runs() -> None:
    clock, costs = Clock(), Changing()
    admission = make(clock, costs)
    with pytest.raises(DeadlineExceeded):
        admission.decide(demand(deadline=clock.now + 0.9))
    costs.seconds = 0.5
    clock.now += ESTIMATES_KEPT_S
    assert admission.decide(demand(deadline=clock.now + 0.9)) is not None
