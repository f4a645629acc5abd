"""Runs searches in batches on the one thread that owns the device, and hands the answers to the event loop.

What enters, when it runs and what shares a batch is decided by `serving.online.admission`; this file has the thread,
the lock and the futures. Requests that arrive during a search wait for the boundary to the next one; an idle engine
starts at once. Jobs are cancelled, expired or answered on the event loop that submitted them.

The engine is dead, for good, once its thread has ended, once a batch does not come back (`serving.online.watchdog`), or
once batches fail in a row and so does a search that is known to work: only a restart helps then.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Generic, TypeVar

from serving.errors import DeadlineExceeded, EngineDead
from serving.online.admission import DEAD, Admission, Demand, Job, Plan
from serving.online.watchdog import Watchdog

T = TypeVar("T")
R = TypeVar("R")
X = TypeVar("X")

FAILURES = 3  # batches in a row in which nobody was answered; then the engine has to show that it works


@dataclass(slots=True, eq=False)
class Ticket(Generic[T, R]):
    """A search in the queue, and who waits for its result and the seconds it waited."""

    payload: T
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[R, float]]


@dataclass(slots=True)
class Outcome(Generic[R]):
    """A result, the plan it was computed with, and the seconds it waited in the queue."""

    result: R
    plan: Plan
    waited: float


class EngineHung(Exception):
    """A batch, or the start, did not come back. `stack`: where the engine's thread is."""

    def __init__(self, seconds: float, stack: str) -> None:
        super().__init__(f"what the engine runs has not come back for {seconds:.0f} s")
        self.stack = stack


class EngineBroken(Exception):
    """Batches failed in a row, and so did a search that is known to work."""


class Batcher(Generic[T, R]):
    """`run(payloads)` is called on the engine's thread with payloads of one plan and returns one result each.

    If it raises, each job of that batch is run once more, alone, so that one bad job does not fail the others; what
    fails alone has failed, and the thread goes on. `prepare()` runs first on the same thread (loading, warm-up).
    `check()` is a search known to work; it is run after FAILURES batches in a row in which every job has failed.
    Anything that stops the thread, and whatever else makes the engine dead, fails every waiting and every later job
    with EngineDead, and is reported to `on_death`, once, on the engine's thread or on that of `watch`. `on_depth` gets
    the number of waiting jobs whenever that has changed.
    """

    def __init__(
        self,
        admission: Admission[Ticket[T, R]],
        run: Callable[[Sequence[T]], Sequence[R]],
        *,
        prepare: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
        on_depth: Callable[[int], None] = lambda depth: None,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.admission = admission
        self._run, self._prepare, self._check = run, prepare, check
        self._on_depth, self._on_death = on_depth, on_death
        self._wake = threading.Condition()  # guards `admission`
        self._engine_calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._draining = False
        self._thread: threading.Thread | None = None
        self._failures = 0  # in a row
        self._call: object | None = None  # while the engine runs, another object for every call
        self.death: BaseException | None = None
        self._reported = False

    # The event loop's side

    def decide(self, demand: Demand) -> Plan:
        """What `submit` would decide for this demand now; raises what it would raise at once."""
        with self._wake:
            plan = self.admission.decide(demand)
        assert plan is not None
        return plan

    async def submit(self, demand: Demand, make: Callable[[Plan], T]) -> Outcome[R]:
        """Runs the search that `make` builds for the plan decided on.

        Raises what `Admission.decide` raises, DeadlineExceeded (passed while waiting or running), EngineDead, or what
        `run` raised. A caller that is cancelled takes its job out of the queue.
        """
        loop = asyncio.get_running_loop()
        with self._wake:
            plan = self.admission.decide(demand)
            assert plan is not None
            ticket: Ticket[T, R] = Ticket(make(plan), loop, loop.create_future())
            job = self.admission.enter(ticket, plan, demand.deadline, demand.client)
            self._wake.notify()
        self._on_depth(self.depth)
        left = demand.deadline - self.admission.clock()
        timer = loop.call_later(left, self._expire, job) if left < threading.TIMEOUT_MAX else None
        try:
            result, waited = await ticket.future
            return Outcome(result, plan, waited)
        finally:
            job.abandoned = True
            if timer is not None:
                timer.cancel()
            if job.waiting:
                with self._wake:
                    self.admission.leave(job)
                self._on_depth(self.depth)

    async def between_batches(self, work: Callable[[], X]) -> X:
        """Runs `work` on the engine's thread, before the next batch. Raises what it raises, and EngineDead."""
        done: Future[X] = Future()
        with self._wake:
            if self.death is not None or self._draining:
                raise EngineDead(DEAD)
            self._engine_calls.append((work, done))
            self._wake.notify()
        return await asyncio.wrap_future(done)

    @staticmethod
    def _expire(job: Job[Ticket[T, R]]) -> None:
        job.abandoned = True
        if not job.payload.future.done():
            error = DeadlineExceeded("The time budget ran out; allow more time or fewer steps.")
            job.payload.future.set_exception(error)

    async def drain(self) -> None:
        """Takes no new jobs, finishes those that wait and run, then stops the thread."""
        with self._wake:
            self._draining = True
            self.admission.advance("draining")
            self._wake.notify()
        if self._thread is not None:
            # Polled: joining would block the loop that delivers the answers. A dead thread may hang and never end.
            while self._thread.is_alive() and not self._reported:
                await asyncio.sleep(0.005)

    def watch(self, watchdog: Watchdog) -> None:
        """Declares the engine dead if the running batch, or `prepare`, is hung. To be called as often as the watchdog
        says."""
        with self._wake:
            seconds = watchdog.look(self._call, self.admission.prediction)
        if seconds is not None and self._thread is not None and self.death is None:
            frame = sys._current_frames().get(self._thread.ident or 0)
            self._die(EngineHung(seconds, "".join(traceback.format_stack(frame))))

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return self.admission.depth

    # The engine thread's side

    def start(self) -> None:
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self._call = object()
            self._prepare()
            self._call = None
            while self._wait_for_work():
                self._make_engine_calls()
                self.step()
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self.depth or self._engine_calls or self._draining)
            while self.depth and not self._engine_calls and (pause := self.admission.patience()) > 0:
                self._wake.wait(pause)
            return bool(self.depth or self._engine_calls)

    def _make_engine_calls(self) -> None:
        while self._engine_calls:
            work, done = self._engine_calls.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            self._call = object()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            finally:
                self._call = None

    def step(self) -> int:
        """Runs one batch, if any job waits. Returns how many jobs it held."""
        with self._wake:
            batch, dropped = self.admission.take()
        self._on_depth(self.depth)
        _deliver(dropped, repeat(DeadlineExceeded("The time budget ran out in the queue; allow more time.")))
        if not batch:
            return 0
        started = self.admission.clock()
        outcomes = self._outcomes(batch)
        _deliver(
            batch,
            [
                each if isinstance(each, Exception) else (each, started - job.since)
                for job, each in zip(batch, outcomes, strict=True)
            ],
        )
        with self._wake:
            self.admission.finish()
        self._judge(outcomes)
        return len(batch)

    def _outcomes(self, batch: Sequence[Job[Ticket[T, R]]]) -> list[R | Exception]:
        """What became of each job. Those of a batch that failed are run again, alone."""
        try:
            return [*self._call_engine(batch)]
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [self._alone(job) for job in batch]

    def _alone(self, job: Job[Ticket[T, R]]) -> R | Exception:
        if job.abandoned:
            return DeadlineExceeded("The time budget ran out; allow more time or fewer steps.")
        try:
            return self._call_engine([job])[0]
        except Exception as error:
            return error

    def _call_engine(self, batch: Sequence[Job[Ticket[T, R]]]) -> Sequence[R]:
        self._call = object()
        try:
            results = self._run([job.payload.payload for job in batch])
        finally:
            self._call = None
        if len(results) != len(batch):
            raise RuntimeError(f"The engine gave {len(results)} answers to {len(batch)} requests.")
        return results

    def _judge(self, outcomes: Sequence[R | Exception]) -> None:
        """Raises EngineBroken if the engine is dead. A client's bad requests alone cannot bring that about."""
        failed = all(isinstance(each, Exception) for each in outcomes)
        self._failures = self._failures + 1 if failed else 0
        if self._failures < FAILURES:
            return
        self._failures, self._call = 0, object()
        try:
            self._check()
        except Exception as error:
            raise EngineBroken(f"{FAILURES} batches in a row failed, and so did a search known to work") from error
        finally:
            self._call = None

    def _die(self, error: BaseException) -> None:
        with self._wake:
            if self.death is not None:
                return
            self.death = error
            self.admission.advance("engine dead")
            jobs = self.admission.clear()
        _deliver(jobs, repeat(EngineDead(DEAD)))
        while self._engine_calls:
            _, done = self._engine_calls.popleft()
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineDead(DEAD))
        self._on_death(error)
        self._reported = True


def _deliver(jobs: Sequence[Job[Ticket[T, R]]], outcomes: Iterable[tuple[R, float] | Exception]) -> None:
    """Answers jobs on their own loops, unless they were answered or cancelled before. One wake-up per loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[tuple[R, float]], Any]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=False):  # one error, repeated, may stand for all
        by_loop.setdefault(job.payload.loop, []).append((job.payload.future, outcome))

    def deliver(answers: list[tuple[asyncio.Future[tuple[R, float]], Any]]) -> None:
        for future, outcome in answers:
            if future.done():
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, answers)
