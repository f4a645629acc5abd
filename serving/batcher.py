"""Who is computed when: queue, work bound, deadlines, and what shares a batch. Knows no model and no device.

One thread owns the device. It takes the oldest job and every other waiting job with the same key, up to the batch's
size, and hands them to `run`. Jobs that arrive meanwhile wait for the next boundary between two searches; an idle
engine starts at once. Jobs are cancelled, expired or answered on the event loop that submitted them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.errors import DeadlineExceeded, Draining, EngineDead, Overloaded

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One search to run. Jobs of equal `key` may share a batch; its cost is beam rows times decoder steps."""

    payload: T
    key: Hashable
    rows: int
    steps: int

    @property
    def work(self) -> int:
        return self.rows * self.steps


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    job: Job[T]
    number: int
    deadline: float | None
    since: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[R, float]]


@dataclass(slots=True)
class _Queue(Generic[T, R]):
    """Waiting jobs by key, oldest first within a key, and the sum of their work."""

    groups: dict[Hashable, deque[_Waiting[T, R]]] = field(default_factory=dict)
    work: int = 0
    length: int = 0

    def add(self, waiting: _Waiting[T, R]) -> None:
        self.groups.setdefault(waiting.job.key, deque()).append(waiting)
        self.work += waiting.job.work
        self.length += 1

    def discard(self, waiting: _Waiting[T, R]) -> None:
        group = self.groups.get(waiting.job.key)
        if group is None or waiting not in group:
            return
        group.remove(waiting)
        self.work -= waiting.job.work
        self.length -= 1
        if not group:
            del self.groups[waiting.job.key]

    def oldest_group(self) -> list[_Waiting[T, R]]:
        """The group whose head has waited longest: no key starves, however busy the others are."""
        heads = {group[0].number: group for group in self.groups.values()}
        return list(heads[min(heads)]) if heads else []


class Batcher(Generic[T, R]):
    """Runs jobs in batches on one thread.

    `run(payloads)` is called on that thread with payloads of one key and returns one result each; if it raises, the
    jobs of that batch fail and the thread goes on. `prepare()` runs first on the same thread (loading, warm-up).
    Anything that stops the thread fails every waiting and every later job with EngineDead.
    `max_batch`: jobs in a batch; `max_rows`: beam rows in a batch; `max_queued_work`: bound of the queue.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        *,
        max_batch: int,
        max_rows: int,
        max_queued_work: int,
        prepare: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._prepare, self._clock = run, prepare, clock
        self._max_batch, self._max_rows, self._max_queued_work = max_batch, max_rows, max_queued_work
        self._queue: _Queue[T, R] = _Queue()
        self._running: list[_Waiting[T, R]] = []
        self._seconds_per_work = 0.0  # measured; 0 until the first batch
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._draining = False
        self._thread: threading.Thread | None = None
        self.death: BaseException | None = None

    # The event loop's side

    async def submit(self, job: Job[T], deadline: float | None = None) -> tuple[R, float]:
        """The job's result and the seconds it waited. `deadline` is a time of the batcher's clock.

        Raises Overloaded (no room), Draining, DeadlineExceeded (passed while waiting or running), EngineDead, or what
        `run` raised. A caller that is cancelled takes its job out of the queue.
        """
        now = self._clock()
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded("The time budget was used up before the search began; allow more time.")
        loop = asyncio.get_running_loop()
        waiting: _Waiting[T, R] = _Waiting(job, next(self._numbers), deadline, now, loop, loop.create_future())
        with self._wake:
            self._admit(job)
            self._queue.add(waiting)
            self._wake.notify()
        timer = None if deadline is None else loop.call_later(deadline - now, self._expire, waiting)
        try:
            return await waiting.future
        finally:
            if timer is not None:
                timer.cancel()
            with self._wake:
                self._queue.discard(waiting)

    def _admit(self, job: Job[T]) -> None:
        if self.death is not None:
            raise EngineDead("The engine has stopped; restart the service.")
        if self._draining:
            raise Draining("The service is shutting down; send the request to another replica.")
        # A job larger than the whole bound is still answered by an idle engine.
        if self._queue.length and self._queue.work + job.work > self._max_queued_work:
            raise Overloaded("The queue is full; try again later.", retry_after=max(self._wait_seconds(), 0.05))

    @staticmethod
    def _expire(waiting: _Waiting[T, R]) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(DeadlineExceeded("The time budget ran out; allow more time or fewer steps."))

    async def drain(self) -> None:
        """Take no new jobs, finish those that wait and run, then stop the thread."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        if self._thread is not None:
            while self._thread.is_alive():  # polled: joining would block the loop that delivers the answers
                await asyncio.sleep(0.005)

    # What the outside may ask

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return self._queue.length

    @property
    def expected_wait(self) -> float:
        """Seconds a job submitted now would wait, by the work before it and the measured speed."""
        with self._wake:
            return self._wait_seconds()

    def _wait_seconds(self) -> float:
        return (self._queue.work + sum(waiting.job.work for waiting in self._running)) * self._seconds_per_work

    # The engine thread's side

    def start(self) -> None:
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self._prepare()
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._queue.length or self._draining)
            return self._queue.length > 0

    def step(self) -> int:
        """Run one batch, if any job waits. Returns how many jobs it held."""
        with self._wake:
            batch = self._running = self._take()
        if not batch:
            return 0
        started = self._clock()
        try:
            results = self._run([waiting.job.payload for waiting in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"The engine gave {len(results)} answers to {len(batch)} requests.")
        except Exception as error:
            for waiting in batch:
                _settle(waiting, error=error)
        else:
            for waiting, result in zip(batch, results, strict=True):
                _settle(waiting, (result, started - waiting.since))
            self._measure(batch, self._clock() - started)
        with self._wake:
            self._running = []
        return len(batch)

    def _take(self) -> list[_Waiting[T, R]]:
        """Remove and return the next batch; jobs that are expired or gone are dropped before they cost anything."""
        batch: list[_Waiting[T, R]] = []
        now, rows = self._clock(), 0
        while not batch and self._queue.length:
            for waiting in self._queue.oldest_group():
                expired = waiting.deadline is not None and waiting.deadline <= now
                if expired or waiting.future.done():
                    self._queue.discard(waiting)
                    _settle(waiting, error=DeadlineExceeded("The time budget ran out while waiting in the queue."))
                    continue
                if batch and (len(batch) >= self._max_batch or rows + waiting.job.rows > self._max_rows):
                    break
                self._queue.discard(waiting)
                batch.append(waiting)
                rows += waiting.job.rows
        return batch

    def _measure(self, batch: list[_Waiting[T, R]], seconds: float) -> None:
        speed = seconds / max(1, sum(waiting.job.work for waiting in batch))
        self._seconds_per_work = speed if not self._seconds_per_work else 0.9 * self._seconds_per_work + 0.1 * speed

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self.death = error
            left = self._running + [waiting for group in self._queue.groups.values() for waiting in group]
            self._queue, self._running = _Queue(), []
        for waiting in left:
            _settle(waiting, error=EngineDead("The engine has stopped; restart the service."))


def _settle(waiting: _Waiting[T, R], result: tuple[R, float] | None = None, error: Exception | None = None) -> None:
    """Answer a job on its own loop, unless it was answered or cancelled before."""

    def deliver() -> None:
        if waiting.future.done():
            return
        if error is not None:
            waiting.future.set_exception(error)
        else:
            waiting.future.set_result(result)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
        waiting.loop.call_soon_threadsafe(deliver)
