"""The batcher without a model: `run` is a function of the test, time is a number of the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Hashable, Sequence
from typing import Any

import pytest

from serving.errors import DeadlineExceeded, Draining, EngineDead, Overloaded
from serving.online.batcher import HALF_LIFE, Batcher, Job


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(name: str, key: str = "a", rows: int = 10) -> Job[str]:
    return Job(name, key, rows)


def free(key: Hashable, rows: int) -> float:
    return 0.0


def make(run: Any, clock: Any = time.monotonic, cost: Any = free, **bounds: float) -> Batcher[str, str]:
    return Batcher(run, cost, **{"max_batch": 4, "max_rows": 1000, "max_wait": 10.0, **bounds}, clock=clock)  # type: ignore[arg-type]


def recorded() -> tuple[list[list[str]], Any]:
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


def test_equal_keys_share_a_batch_and_each_gets_its_own_answer() -> None:
    batches, run = recorded()

    async def scenario() -> list[str]:
        batcher = make(run)
        tasks = await submitted(*(batcher.submit(job(name, key)) for name, key in map(tuple, ["pa", "qb", "ra", "sb"])))
        await step_all(batcher)
        return [(await task)[0] for task in tasks]

    assert asyncio.run(scenario()) == ["P", "Q", "R", "S"]
    assert batches == [["p", "r"], ["q", "s"]]


def test_the_oldest_job_is_always_in_the_next_batch() -> None:
    """A rare key is not starved by a busy one."""
    batches, run = recorded()

    async def scenario() -> None:
        batcher = make(run, max_batch=2)
        tasks = await submitted(
            *(batcher.submit(job(name, key)) for name, key in map(tuple, ["1a", "2a", "3b", "4a", "5a"]))
        )
        batcher.step()
        tasks += await submitted(batcher.submit(job("6", "a")))
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert batches == [["1", "2"], ["3"], ["4", "5"], ["6"]]


def test_a_batch_is_bounded_by_jobs_and_by_rows() -> None:
    batches, run = recorded()

    async def scenario() -> None:
        batcher = make(run, max_batch=3, max_rows=25)
        tasks = await submitted(
            *(batcher.submit(job(name, rows=rows)) for name, rows in [("a", 10), ("b", 10), ("c", 10), ("d", 99)])
        )
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert batches == [["a", "b"], ["c"], ["d"]]  # what is wider than the bound runs alone


def by_rows(key: Hashable, rows: int) -> float:
    """A search of n rows takes 1 + n / 10 seconds."""
    return 1 + rows / 10


def test_the_queue_is_bounded_by_work_not_by_count() -> None:
    _, run = recorded()

    async def scenario() -> None:
        batcher = make(run, Clock(), by_rows, max_batch=100, max_wait=5.0)
        tasks = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(30)))
        assert batcher.depth == 30 and batcher.expected_wait == 4.0  # one batch of 30 rows
        with pytest.raises(Overloaded) as overloaded:
            await batcher.submit(job("wide", rows=50))  # one job of 50 rows
        assert overloaded.value.retry_after == 4.0
        tasks += await submitted(batcher.submit(job("one more", rows=1)))
        await step_all(batcher)
        await asyncio.gather(*tasks)
        alone = await submitted(batcher.submit(job("huge", rows=500)))  # an idle engine takes it
        await step_all(batcher)
        assert (await alone[0])[0] == "HUGE"

    asyncio.run(scenario())


def test_a_full_queue_refuses_everything_until_it_has_come_down() -> None:
    clock = Clock()

    async def scenario() -> None:
        batcher = make(list, clock, by_rows, max_batch=10, max_wait=20.0)
        batcher.check_room()
        tasks = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(96)))
        batcher.check_room()  # nothing was refused yet
        with pytest.raises(Overloaded):
            batcher.admit("b", 10)
        with pytest.raises(Overloaded) as overloaded:
            batcher.check_room()
        assert overloaded.value.retry_after == pytest.approx(19.6)
        clock.now += 1.5  # 18.1 s are left, of 20
        with pytest.raises(Overloaded):
            batcher.check_room()
        clock.now += 0.2
        batcher.check_room()
        clock.now -= 0.2
        await step_all(batcher)  # faster than it was thought to be
        batcher.check_room()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_large_job_that_finds_no_room_does_not_keep_out_small_ones() -> None:
    async def scenario() -> None:
        batcher = make(list, Clock(), by_rows, max_batch=10, max_wait=20.0)
        tasks = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(80)))
        with pytest.raises(Overloaded):
            batcher.admit("b", 50)
        batcher.check_room()
        tasks += await submitted(batcher.submit(job("small", rows=1)))
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_many_waiting_cannot_exceed_the_bound() -> None:
    async def scenario() -> None:
        batcher = make(list, Clock(), by_rows, max_batch=10, max_wait=20.0)
        calls = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(1000)))
        assert batcher.depth == 100 and batcher.expected_wait == 20.0  # ten batches of 2 s
        await asyncio.sleep(0)
        refused = [call for call in calls if call.done()]
        assert len(refused) == 900 and all(isinstance(call.exception(), Overloaded) for call in refused)
        await step_all(batcher)
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())


def test_what_is_ahead_is_told_by_what_runs_waits_and_shares_the_batch() -> None:
    clock = Clock()
    told: list[tuple[float, int]] = []

    async def scenario() -> None:
        def run(payloads: Sequence[str]) -> list[str]:
            clock.now += 0.5
            told.append(batcher.ahead("a", 10))
            return list(payloads)

        batcher = make(run, clock, by_rows, max_batch=2)
        assert batcher.ahead("a", 10) == (0.0, 0)
        tasks = await submitted(batcher.submit(job("runs", "b", rows=20)))
        assert batcher.ahead("b", 20) == (0.0, 20)  # the next batch, beside the one that waits
        assert batcher.ahead("a", 10) == (3.0, 0)
        tasks += await submitted(*(batcher.submit(job(name, "a")) for name in "xyz"))
        assert batcher.ahead("a", 10) == (6.0, 10)  # a batch of b, a full one of a, then beside one
        assert batcher.ahead("c", 1) == (8.0, 0)
        batcher.step()
        assert told == [(5.5, 10)]  # half a second of the running batch is over
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_the_queue_is_bounded_by_the_time_that_work_takes_now() -> None:
    """Batches come to take three times as long as they used to, and then as long as before."""
    clock, slower = Clock(), 3.0

    async def full(batcher: Batcher[str, str]) -> int:
        """How many jobs find room."""
        calls = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(200)))
        depth = batcher.depth
        await step_all(batcher)
        await asyncio.gather(*calls, return_exceptions=True)
        return depth

    async def scenario() -> None:
        def run(payloads: Sequence[str]) -> list[str]:
            clock.now += slower * by_rows("a", len(payloads))
            return list(payloads)

        nonlocal slower
        batcher = make(run, clock, by_rows, max_batch=10, max_wait=20.0)
        assert await full(batcher) == 100  # ten batches of 2 s
        assert await full(batcher) == 30  # three of 6 s, and no room for a fourth
        waiting = await submitted(*(batcher.submit(job(str(i), rows=1)) for i in range(10)))
        assert batcher.expected_wait == batcher.ahead("b", 1)[0] == pytest.approx(6.0, rel=0.05)
        slower = 1.0
        await step_all(batcher)
        await asyncio.gather(*waiting)
        for _ in range(2):
            await full(batcher)
        assert 98 <= await full(batcher) <= 100

    asyncio.run(scenario())


def test_a_single_stall_makes_no_slow_pace() -> None:
    clock, stalls = Clock(), [0.0] * 20 + [3.0] + [0.0] * 10

    async def scenario() -> None:
        def run(payloads: Sequence[str]) -> list[str]:
            clock.now += 0.05 + stalls.pop(0)
            return list(payloads)

        batcher = make(run, clock, lambda key, rows: 0.05)
        for _ in range(21):
            task = await submitted(batcher.submit(job("a")))
            await step_all(batcher)
            await asyncio.gather(*task)
        tasks = await submitted(*(batcher.submit(job("a")) for _ in range(40)))  # ten batches, 0.5 s
        assert batcher.expected_wait < 1.0
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_the_pace_is_forgotten_when_nothing_runs() -> None:
    clock = Clock()

    async def scenario() -> None:
        def run(payloads: Sequence[str]) -> list[str]:
            clock.now += 6.0
            return list(payloads)

        batcher = make(run, clock, by_rows)
        for name in ("slow", "as slow"):
            task = await submitted(batcher.submit(job(name)))
            await step_all(batcher)
            await asyncio.gather(*task)
        clock.now += 20 * HALF_LIFE
        task = await submitted(batcher.submit(job("later")))
        assert batcher.expected_wait == pytest.approx(2.0, rel=0.01)
        await step_all(batcher)
        await asyncio.gather(*task)

    asyncio.run(scenario())


def test_at_a_slow_pace_what_would_be_late_is_dropped_earlier() -> None:
    batches, run = recorded()
    clock = Clock()

    def slow(payloads: Sequence[str]) -> list[str]:
        clock.now += 6.0
        return run(payloads)

    async def scenario() -> None:
        batcher = make(slow, clock, by_rows)
        first = await submitted(batcher.submit(job("first")))
        await step_all(batcher)  # in 6 s, not in 2
        soon, later = await submitted(
            batcher.submit(job("soon"), clock.now + 5), batcher.submit(job("later"), clock.now + 50)
        )
        await step_all(batcher)
        with pytest.raises(DeadlineExceeded):
            await soon
        await asyncio.gather(*first, later)

    asyncio.run(scenario())
    assert batches == [["first"], ["later"]]


def test_a_busy_key_does_not_starve_a_rare_one() -> None:
    """Two keys keep the engine busy without a pause; a third comes now and then, alone."""
    waited: dict[str, list[int]] = {"busy": [], "other": [], "rare": []}
    batches = 0

    async def one(batcher: Batcher[str, str], key: str) -> None:
        came = batches
        await batcher.submit(job(key, key))
        waited[key].append(batches - came)

    async def scenario() -> None:
        nonlocal batches
        batcher = make(list, max_batch=4)
        tasks = await submitted(*(one(batcher, "busy") for _ in range(8)))
        for turn in range(200):
            tasks += await submitted(one(batcher, "busy"), one(batcher, "busy"), one(batcher, "other"))
            if turn % 10 == 0:
                tasks += await submitted(one(batcher, "rare"))
            batches += 1
            assert batcher.step() and batcher.depth  # never idle
            await asyncio.sleep(0)
        await step_all(batcher)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert max(turn for turns in waited.values() for turn in turns) <= 5


def test_expired_and_cancelled_jobs_cost_no_compute() -> None:
    batches, run = recorded()

    async def scenario() -> None:
        clock = Clock()
        batcher = make(run, clock)
        expired, cancelled, alive = await submitted(
            batcher.submit(job("expired"), clock.now + 5),
            batcher.submit(job("gone")),
            batcher.submit(job("alive"), clock.now + 50),
        )
        cancelled.cancel()
        await asyncio.sleep(0)
        assert batcher.depth == 2
        clock.now += 10
        await step_all(batcher)
        with pytest.raises(DeadlineExceeded):
            await expired
        assert (await alive)[0] == "ALIVE"

    asyncio.run(scenario())
    assert batches == [["alive"]]


def test_what_would_be_late_is_dropped_before_it_costs_compute() -> None:
    batches, run = recorded()

    async def scenario() -> None:
        clock = Clock()
        batcher = make(run, clock, by_rows)
        soon, later = await submitted(
            batcher.submit(job("soon"), clock.now + 2.5), batcher.submit(job("later"), clock.now + 50)
        )
        await step_all(batcher)  # together they take 3 s
        with pytest.raises(DeadlineExceeded):
            await soon
        assert (await later)[0] == "LATER"

    asyncio.run(scenario())
    assert batches == [["later"]]


def test_a_deadline_is_told_when_it_passes_not_when_the_engine_gets_there() -> None:
    release = threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        release.wait(10)
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        batcher.start()
        running = (await submitted(batcher.submit(job("slow"))))[0]
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(job("late"), started + 0.05)
        assert time.monotonic() - started < 2
        assert batcher.depth == 0  # its work no longer counts
        release.set()
        await running
        await batcher.drain()

    asyncio.run(scenario())


def test_jobs_join_at_the_next_boundary_and_an_idle_engine_does_not_wait() -> None:
    batches, run = recorded()
    entered, release = threading.Event(), threading.Event()

    def gated(payloads: Sequence[str]) -> list[str]:
        answers = run(payloads)
        entered.set()
        release.wait(10)
        return answers

    async def scenario() -> None:
        batcher = make(gated)
        batcher.start()
        tasks = await submitted(batcher.submit(job("first")))
        await asyncio.to_thread(entered.wait, 5)
        assert batches == [["first"]]
        tasks += await submitted(*(batcher.submit(job(name)) for name in "xyz"))
        release.set()
        await asyncio.gather(*tasks)
        await batcher.drain()

    asyncio.run(scenario())
    assert batches == [["first"], ["x", "y", "z"]]


def test_a_search_that_raises_fails_its_batch_only() -> None:
    def run(payloads: Sequence[str]) -> list[str]:
        if "bad" in payloads:
            raise ValueError("no")
        return list(payloads)

    async def scenario() -> None:
        batcher = make(run)
        batcher.start()
        results = await asyncio.gather(
            batcher.submit(job("bad")),
            batcher.submit(job("mate")),
            batcher.submit(job("other", "b")),
            return_exceptions=True,
        )
        # "bad" may have been taken before "mate" came
        assert isinstance(results[0], ValueError)
        assert results[2][0] == "other"  # type: ignore[index]
        assert (await batcher.submit(job("next")))[0] == "next"
        assert batcher.death is None
        await batcher.drain()

    asyncio.run(scenario())


def test_a_wrong_number_of_answers_is_an_error_not_a_mix_up() -> None:
    async def scenario() -> None:
        batcher = make(lambda payloads: ["only one"])
        tasks = await submitted(batcher.submit(job("a")), batcher.submit(job("b")))
        await step_all(batcher)
        for task in tasks:
            with pytest.raises(RuntimeError, match="1 answers to 2"):
                await task

    asyncio.run(scenario())


def test_a_dead_thread_fails_those_that_run_wait_and_come() -> None:
    entered, release = threading.Event(), threading.Event()

    def run(payloads: Sequence[str]) -> list[str]:
        entered.set()
        release.wait(10)
        raise SystemExit

    told: list[BaseException] = []

    async def scenario() -> None:
        batcher: Batcher[str, str] = Batcher(run, free, max_batch=1, max_rows=1, max_wait=1, on_death=told.append)
        batcher.start()
        running = (await submitted(batcher.submit(job("running"))))[0]
        await asyncio.to_thread(entered.wait, 5)
        waiting = (await submitted(batcher.submit(job("waiting"))))[0]
        release.set()
        for task in (running, waiting):
            with pytest.raises(EngineDead):
                await task
        with pytest.raises(EngineDead):
            await batcher.submit(job("later"))
        await batcher.drain()  # the thread tells it last
        assert isinstance(batcher.death, SystemExit) and told == [batcher.death]

    asyncio.run(scenario())


def test_a_thread_that_cannot_start_is_dead() -> None:
    def prepare() -> None:
        raise OSError("no device")

    async def scenario() -> None:
        batcher: Batcher[str, str] = Batcher(list, free, max_batch=1, max_rows=1, max_wait=1, prepare=prepare)
        batcher.start()
        await batcher.drain()
        with pytest.raises(EngineDead):
            await batcher.submit(job("a"))

    asyncio.run(scenario())


def test_draining_finishes_what_waits_and_takes_nothing_new() -> None:
    batches, run = recorded()

    def slow(payloads: Sequence[str]) -> list[str]:
        time.sleep(0.02)
        return run(payloads)

    async def scenario() -> None:
        batcher = make(slow, max_batch=1)
        batcher.start()
        tasks = await submitted(*(batcher.submit(job(name)) for name in "abc"))
        draining = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await batcher.submit(job("new"))
        await draining
        assert [(await task)[0] for task in tasks] == ["A", "B", "C"]

    asyncio.run(scenario())


def test_under_load_every_job_gets_its_own_answer() -> None:
    async def scenario() -> None:
        batcher = make(lambda payloads: [payload[::-1] for payload in payloads], max_batch=7)
        batcher.start()
        names = [f"job-{i}" for i in range(500)]
        answers = await asyncio.gather(*(batcher.submit(job(name, key=name[-1], rows=1)) for name in names))
        assert [answer for answer, _ in answers] == [name[::-1] for name in names]
        assert batcher.depth == 0 and batcher.expected_wait == 0
        await batcher.drain()

    asyncio.run(scenario())
