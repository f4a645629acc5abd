"""The batcher's thread and futures, without a model: `run` is a function of the test. Decisions are admission's."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from serving.errors import DeadlineExceeded, Draining, EngineDead, Overloaded
from serving.online.admission import Admission, Demand
from serving.online.batcher import FAILURES, Batcher, EngineBroken, EngineHung
from serving.online.watchdog import Watchdog
from tests.waiting import eventually_async

GENEROUS = 60  # seconds; nothing here takes as long


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Free:
    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return 0.0


class ByRows:
    """A search of n rows takes 1 + n / 10 seconds."""

    def estimate(self, steps: int, rows: int, quantile: float, model: str = "") -> float:
        return 1 + rows / 10


def make(run: Any, clock: Any = time.monotonic, costs: Any = None, *, max_batch: int = 4, max_wait: float = 10.0,
         **callbacks: Any) -> Batcher[str, str]:  # fmt: skip
    admission: Admission[Any] = Admission(
        costs or Free(), max_batch=max_batch, max_rows=1000, max_wait=max_wait, clock=clock
    )
    return Batcher(admission, run, **callbacks)


async def submit(
    batcher: Batcher[str, str], payload: str, variant: str = "a", rows: int = 10, deadline: float = math.inf
) -> str:
    return (await batcher.submit(Demand(0, rows, deadline, variant=variant), lambda plan: payload)).result


def recorded() -> tuple[list[list[str]], Callable[[Sequence[str]], list[str]]]:
    batches: list[list[str]] = []

    def run(payloads: Sequence[str]) -> list[str]:
        batches.append(list(payloads))
        return [payload.upper() for payload in payloads]

    return batches, run


async def submitted(*coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Tasks whose jobs are in the queue."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


async def step_all(batcher: Batcher[str, str]) -> None:
    while batcher.step():
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def test_equal_plans_share_a_batch_and_each_gets_its_own_answer() -> None:
    batches, run = recorded()

    async def scenario() -> list[str]:
        batcher = make(run)
        tasks = await submitted(
            *(submit(batcher, name, variant) for name, variant in map(tuple, ["pa", "qb", "ra", "sb"]))
        )
        await step_all(batcher)
        return [await task for task in tasks]

    assert asyncio.run(scenario()) == ["P", "Q", "R", "S"]
    assert batches == [["p", "r"], ["q", "s"]]


def test_an_answer_comes_with_its_plan_and_its_wait() -> None:
    clock = Clock()

    async def scenario() -> None:
        batcher = make(list, clock)
        (task,) = await submitted(
            batcher.submit(Demand(3, 7), lambda plan: f"{plan.steps} steps, {plan.beam_width} beams")
        )
        clock.now += 2.5
        batcher.step()
        outcome = await task
        assert (outcome.result, outcome.plan[:2], outcome.waited) == ("3 steps, 7 beams", (3, 7), 2.5)

    asyncio.run(scenario())


def test_what_admission_refuses_never_reaches_the_queue() -> None:
    async def scenario() -> None:
        depths: list[int] = []
        batcher = make(list, Clock(), ByRows(), max_batch=10, max_wait=20.0, on_depth=depths.append)
        calls = await submitted(*(submit(batcher, str(i), rows=1) for i in range(1000)))
        assert batcher.depth == 100 == max(depths)  # ten batches of 2 s
        await asyncio.sleep(0)
        refused = [call for call in calls if call.done()]
        assert len(refused) == 900 and all(isinstance(call.exception(), Overloaded) for call in refused)
        with pytest.raises(Overloaded):
            batcher.decide(Demand(0, 1, variant="a"))
        await step_all(batcher)
        await asyncio.gather(*calls, return_exceptions=True)
        assert depths[-1] == 0

    asyncio.run(scenario())


def test_expired_and_cancelled_jobs_cost_no_compute() -> None:
    batches, run = recorded()

    async def scenario() -> None:
        clock = Clock()
        batcher = make(run, clock)
        expired, cancelled, alive = await submitted(
            submit(batcher, "expired", deadline=clock.now + 5),
            submit(batcher, "gone"),
            submit(batcher, "alive", deadline=clock.now + 50),
        )
        cancelled.cancel()
        await asyncio.sleep(0)
        assert batcher.depth == 2
        clock.now += 10
        await step_all(batcher)
        with pytest.raises(DeadlineExceeded):
            await expired
        assert await alive == "ALIVE"

    asyncio.run(scenario())
    assert batches == [["alive"]]


def test_a_deadline_that_passes_while_another_batch_runs_is_answered_at_once() -> None:
    release = threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        release.wait(GENEROUS)
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        batcher.start()
        running = (await submitted(submit(batcher, "slow")))[0]
        with pytest.raises(DeadlineExceeded):
            await submit(batcher, "late", deadline=time.monotonic() + 0.05)
        assert not running.done() and batcher.depth == 0  # its work no longer counts
        release.set()
        await running
        await batcher.drain()

    asyncio.run(scenario())


def test_a_deadline_that_passes_in_the_middle_of_a_search_leaves_its_batch_mates_their_answers() -> None:
    entered, release = threading.Event(), threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(GENEROUS)
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        late, mate = await submitted(submit(batcher, "late", deadline=time.monotonic() + 0.2), submit(batcher, "mate"))
        batcher.start()
        await asyncio.to_thread(entered.wait, GENEROUS)
        with pytest.raises(DeadlineExceeded):
            await late
        release.set()
        assert await asyncio.wait_for(mate, GENEROUS) == "mate"
        await batcher.drain()

    asyncio.run(scenario())


def test_jobs_join_at_the_next_boundary_and_an_idle_engine_does_not_wait() -> None:
    batches, run = recorded()
    entered, release = threading.Event(), threading.Event()

    def gated(payloads: Sequence[str]) -> list[str]:
        answers = run(payloads)
        entered.set()
        release.wait(GENEROUS)
        return answers

    async def scenario() -> None:
        batcher = make(gated)
        batcher.start()
        tasks = await submitted(submit(batcher, "first"))
        await asyncio.to_thread(entered.wait, GENEROUS)
        assert batches == [["first"]]
        tasks += await submitted(*(submit(batcher, name) for name in "xyz"))
        release.set()
        await asyncio.gather(*tasks)
        await batcher.drain()

    asyncio.run(scenario())
    assert batches == [["first"], ["x", "y", "z"]]


def test_a_job_that_fails_its_batch_fails_alone() -> None:
    batches: list[list[str]] = []

    def run(payloads: Sequence[str]) -> list[str]:
        batches.append(list(payloads))
        if "bad" in payloads:
            raise ValueError("no")
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        mate, bad, third, other = await submitted(
            submit(batcher, "mate"), submit(batcher, "bad"), submit(batcher, "third"),
            submit(batcher, "other", variant="b"),
        )  # fmt: skip
        await step_all(batcher)
        with pytest.raises(ValueError, match="no"):
            await bad
        assert [await mate, await third, await other] == ["mate", "third", "other"]
        assert batcher.death is None

    asyncio.run(scenario())
    assert batches == [["mate", "bad", "third"], ["mate"], ["bad"], ["third"], ["other"]]  # each again, once


def test_a_job_nobody_waits_for_any_more_is_not_run_again() -> None:
    async def scenario() -> None:
        def run(payloads: Sequence[str]) -> list[str]:
            batches.append(list(payloads))
            gone.cancel()
            if len(payloads) > 1:
                raise ValueError("no")
            return list(payloads)

        batches: list[list[str]] = []
        batcher = make(run)
        gone, alive = await submitted(submit(batcher, "gone"), submit(batcher, "alive"))
        step = asyncio.ensure_future(asyncio.to_thread(batcher.step))
        await eventually_async(step.done)
        assert await alive == "alive" and gone.cancelled()

    asyncio.run(scenario())


def failing(works: Sequence[str] = ()) -> Callable[[Sequence[str]], list[str]]:
    def run(payloads: Sequence[str]) -> list[str]:
        if any(payload not in works for payload in payloads):
            raise ValueError("device-side assert")
        return list(payloads)

    return run


def test_an_engine_that_fails_at_everything_is_dead_after_some_batches() -> None:
    def check() -> None:
        checks.append(1)
        raise ValueError("device-side assert")

    checks: list[int] = []
    deaths: list[BaseException] = []

    async def scenario() -> None:
        batcher = make(failing(), check=check, on_death=deaths.append)
        batcher.start()
        for _ in range(FAILURES):
            assert not checks
            with pytest.raises(ValueError, match="assert"):
                await submit(batcher, "a")
        await eventually_async(lambda: deaths)
        with pytest.raises(EngineDead):
            await submit(batcher, "b")
        await batcher.drain()

    asyncio.run(scenario())
    assert isinstance(deaths[0], EngineBroken) and isinstance(deaths[0].__cause__, ValueError) and len(deaths) == 1


def test_bad_requests_alone_never_make_an_engine_dead() -> None:
    """However many come in a row: a search known to work tells them from a broken engine."""
    checks: list[int] = []

    async def scenario() -> None:
        batcher = make(failing(["good"]), check=lambda: checks.append(1))
        batcher.start()
        for _ in range(3 * FAILURES):
            with pytest.raises(ValueError, match="assert"):
                await submit(batcher, "bad")
        assert await submit(batcher, "good") == "good" and batcher.death is None
        for _ in range(FAILURES - 1):  # an answer in between begins the count anew
            with pytest.raises(ValueError, match="assert"):
                await submit(batcher, "bad")
        assert await submit(batcher, "good") == "good"
        await batcher.drain()

    asyncio.run(scenario())
    assert len(checks) == 3


def test_a_hung_engine_is_dead_and_nobody_waits_for_it_not_even_the_end() -> None:
    entered, release = threading.Event(), threading.Event()
    deaths: list[BaseException] = []

    def run(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(GENEROUS)
        return list(payloads)

    async def scenario() -> None:
        clock = Clock()
        batcher, watchdog = make(run, max_batch=1, on_death=deaths.append), Watchdog(30, clock)
        batcher.start()
        running = (await submitted(submit(batcher, "running")))[0]
        await asyncio.to_thread(entered.wait, GENEROUS)
        waiting = (await submitted(submit(batcher, "waiting")))[0]
        for _ in range(40):
            clock.now += 1
            batcher.watch(watchdog)
        for task in (running, waiting):
            with pytest.raises(EngineDead):
                await task
        with pytest.raises(EngineDead):
            await submit(batcher, "later")
        await batcher.drain()
        release.set()  # a call that comes back after all changes nothing

    asyncio.run(scenario())
    (death,) = deaths
    assert isinstance(death, EngineHung) and "31 s" in str(death) and "release.wait" in death.stack


def test_a_wrong_number_of_answers_is_an_error_not_a_mix_up() -> None:
    async def scenario() -> None:
        batcher = make(lambda payloads: payloads[1:])
        tasks = await submitted(submit(batcher, "a"), submit(batcher, "b"))
        await step_all(batcher)
        for task in tasks:
            with pytest.raises(RuntimeError, match="0 answers to 1"):
                await task

    asyncio.run(scenario())


def test_a_dead_thread_fails_those_that_run_wait_and_come() -> None:
    entered, release = threading.Event(), threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(GENEROUS)
        raise SystemExit

    deaths: list[BaseException] = []

    async def scenario() -> None:
        batcher = make(run, max_batch=1, on_death=deaths.append)
        batcher.start()
        running = (await submitted(submit(batcher, "running")))[0]
        await asyncio.to_thread(entered.wait, GENEROUS)
        waiting = (await submitted(submit(batcher, "waiting")))[0]
        release.set()
        for task in (running, waiting):
            with pytest.raises(EngineDead):
                await task
        with pytest.raises(EngineDead):
            await submit(batcher, "later")
        await batcher.drain()  # the thread reports its death last
        assert isinstance(batcher.death, SystemExit) and deaths == [batcher.death]
        assert batcher.admission.state == "engine dead"

    asyncio.run(scenario())


def test_a_thread_that_cannot_start_is_dead() -> None:
    def prepare() -> None:
        raise OSError("no device")

    async def scenario() -> None:
        batcher = make(list, prepare=prepare)
        batcher.start()
        await batcher.drain()
        with pytest.raises(EngineDead):
            await submit(batcher, "a")

    asyncio.run(scenario())


def test_draining_finishes_what_waits_and_takes_nothing_new() -> None:
    batches, run = recorded()
    entered, release = threading.Event(), threading.Event()

    def gated(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(GENEROUS)
        return run(payloads)

    async def scenario() -> None:
        batcher = make(gated, max_batch=1)
        batcher.start()
        tasks = await submitted(*(submit(batcher, name) for name in "abc"))
        await asyncio.to_thread(entered.wait, GENEROUS)
        draining = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await submit(batcher, "new")
        release.set()
        await draining
        assert [await task for task in tasks] == ["A", "B", "C"]

    asyncio.run(scenario())
    assert batches == [["a"], ["b"], ["c"]]


def test_under_load_every_job_gets_its_own_answer() -> None:
    async def scenario() -> None:
        batcher = make(lambda payloads: [payload[::-1] for payload in payloads], max_batch=7)
        batcher.start()
        names = [f"job-{i}" for i in range(500)]
        answers = await asyncio.gather(*(submit(batcher, name, variant=name[-1], rows=1) for name in names))
        assert answers == [name[::-1] for name in names]
        assert batcher.depth == 0
        await batcher.drain()

    asyncio.run(scenario())


def test_a_job_is_abandoned_from_the_moment_its_deadline_passes_or_its_caller_goes() -> None:
    """Also one that runs: should its batch fail, nobody waits for it to be tried again."""
    entered, release = threading.Event(), threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(GENEROUS)
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        (waiting,) = await submitted(submit(batcher, "waits"))
        (job,) = next(iter(batcher.admission._waiting.values())).values()
        batcher._expire(job)
        assert job.abandoned  # at once, though its caller has not been told yet
        with pytest.raises(DeadlineExceeded):
            await waiting
        (running,) = await submitted(submit(batcher, "runs"))
        batcher.start()
        await asyncio.to_thread(entered.wait, GENEROUS)
        (job,) = batcher.admission._running
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert job.abandoned
        release.set()
        await batcher.drain()

    asyncio.run(scenario())


def test_the_engine_waits_as_long_as_admission_has_patience() -> None:
    """For a client that will be back in a moment: its job shares the batch, however short the pause."""
    batches, run = recorded()

    async def scenario() -> None:
        batcher = make(run)
        asked = threading.Event()

        def patience() -> float:
            asked.set()
            return 0.0 if batcher.depth == 2 else 0.01

        batcher.admission.patience = patience  # type: ignore[method-assign]
        batcher.start()
        first = (await submitted(submit(batcher, "first")))[0]
        assert await asyncio.to_thread(asked.wait, GENEROUS)
        assert await asyncio.gather(first, submit(batcher, "second")) == ["FIRST", "SECOND"]
        await batcher.drain()

    asyncio.run(scenario())
    assert batches == [["first", "second"]]


# Work between batches


def test_other_work_runs_on_the_engines_thread_before_the_next_batch() -> None:
    async def check() -> None:
        order: list[str] = []
        running, go_on = threading.Event(), threading.Event()

        def run(payloads: Sequence[str]) -> list[str]:
            running.set()
            assert go_on.wait(GENEROUS)
            order.extend(payloads)
            return list(payloads)

        batcher = make(run)
        batcher.start()
        assert await batcher.between_batches(lambda: threading.current_thread().name) == "engine"  # an idle one too
        [first] = await submitted(submit(batcher, "first"))
        await asyncio.to_thread(running.wait, GENEROUS)
        work, second = await submitted(batcher.between_batches(lambda: order.append("work")), submit(batcher, "second"))
        go_on.set()
        await asyncio.gather(first, work, second)
        assert order == ["first", "work", "second"]
        with pytest.raises(ZeroDivisionError):
            await batcher.between_batches(lambda: 1 / 0)
        assert await submit(batcher, "third") == "third"  # and the thread goes on
        await batcher.drain()
        with pytest.raises(EngineDead):
            await batcher.between_batches(lambda: None)

    asyncio.run(check())


def test_other_work_is_refused_once_the_engine_is_dead() -> None:
    async def check() -> None:
        reached, go_on = threading.Event(), threading.Event()

        def die(payloads: Sequence[str]) -> list[str]:
            reached.set()
            assert go_on.wait(GENEROUS)
            raise SystemExit

        batcher = make(die)
        batcher.start()
        [job] = await submitted(submit(batcher, "a"))
        await asyncio.to_thread(reached.wait, GENEROUS)
        [work] = await submitted(batcher.between_batches(lambda: None))
        go_on.set()
        outcomes = await asyncio.gather(job, work, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineDead, EngineDead]

    asyncio.run(check())
