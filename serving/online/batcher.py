"""Who is computed when: queue, work bound, deadlines, and what shares a batch. Knows no model and no device.

One thread owns the device. It takes the oldest job and every other waiting job with the same key, up to the batch's
size, and hands them to `run`. Jobs that arrive meanwhile wait for the next boundary between two searches; an idle
engine starts at once. Jobs are cancelled, expired or answered on the event loop that submitted them.

How long the queue takes is what its batches usually cost times the *pace*: the seconds that batches took of late, all
between them included, over those reckoned for them. A flood of requests takes cores and locks from the engine within
milliseconds; a queue reckoned by what searches cost before would hold work for twice its bound, and answer too late.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Any, Generic, TypeVar

from serving.errors import DeadlineExceeded, Draining, EngineDead, Overloaded

T = TypeVar("T")
R = TypeVar("R")
Key = tuple[Hashable, int]  # what may share a batch: the job's key, and its rows

NO_ROOM = "The queue is full; try again later."
LEAST_WAIT = 0.05  # seconds; nobody is told to come back sooner
NEARLY = 0.9  # of the bound: once it is reached, the queue is full until it has come down to this
HALF_LIFE = 1.0  # seconds after which a batch counts for half in the pace
PRIOR = 0.1  # seconds, as if so much work had just been done at the pace 1
SLOWEST = 4.0  # times what was reckoned, as which a batch counts at most: a machine that stalled once is not slow


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One search to run, of so many beam rows. Jobs of equal `key` and rows may share a batch."""

    payload: T
    key: Hashable
    rows: int


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    job: Job[T]
    number: int
    deadline: float | None
    since: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[R, float]]

    @property
    def key(self) -> Key:
        return self.job.key, self.job.rows


@dataclass(slots=True)
class _Queue(Generic[T, R]):
    """Waiting jobs by key; within a key by number, so oldest first."""

    groups: dict[Key, dict[int, _Waiting[T, R]]] = field(default_factory=dict)
    length: int = 0

    def add(self, waiting: _Waiting[T, R]) -> None:
        self.groups.setdefault(waiting.key, {})[waiting.number] = waiting
        self.length += 1

    def discard(self, waiting: _Waiting[T, R]) -> None:
        group = self.groups.get(waiting.key, {})
        if group.pop(waiting.number, None) is not None:
            self.length -= 1
            if not group:
                del self.groups[waiting.key]

    def holds(self, waiting: _Waiting[T, R]) -> bool:
        return waiting.number in self.groups.get(waiting.key, ())

    def oldest_group(self) -> list[_Waiting[T, R]]:
        """The group whose head has waited longest: no key starves, however busy the others are."""
        oldest = min(self.groups, key=lambda key: next(iter(self.groups[key])))
        return list(self.groups[oldest].values())


class Batcher(Generic[T, R]):
    """Runs jobs in batches on one thread.

    `run(payloads)` is called on that thread with payloads of one key and returns one result each; if it raises, the
    jobs of that batch fail and the thread goes on. `prepare()` runs first on the same thread (loading, warm-up).
    Anything that stops the thread fails every waiting and every later job with EngineDead, and is told to `on_death`.
    `cost(key, rows)`: seconds that a batch usually takes, as measured. `max_batch`: jobs in a batch; `max_rows`: beam
    rows in a batch; `max_wait`: bound of the queue, in seconds of the work that waits and runs. `on_depth`: told how
    many jobs wait whenever that has changed.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        cost: Callable[[Any, int], float],
        *,
        max_batch: int,
        max_rows: int,
        max_wait: float,
        prepare: Callable[[], None] = lambda: None,
        on_depth: Callable[[int], None] = lambda depth: None,
        on_death: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._cost, self._prepare, self._on_death, self._clock = run, cost, prepare, on_death, clock
        self._max_batch, self._max_rows, self._max_wait = max_batch, max_rows, max_wait
        self._on_depth = on_depth
        self._queue: _Queue[T, R] = _Queue()
        self._running: list[_Waiting[T, R]] = []
        self._seconds: dict[tuple[Key, int], float] = {}  # what groups take, as far as asked since the last batch
        self._free_at = 0.0  # when the batch that runs is likely to end
        self._reckoned, self._took, self._paced_at = 0.0, 0.0, 0.0  # seconds of the batches of late, for the pace
        self._full_until, self._full_wait = -math.inf, 0.0
        self._numbers = count()
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
            self._admit(waiting.key)
            self._queue.add(waiting)
            self._wake.notify()
        self._on_depth(self.depth)
        timer = None if deadline is None else loop.call_later(deadline - now, self._expire, waiting)
        try:
            return await waiting.future
        finally:
            if timer is not None:
                timer.cancel()
            if self._queue.holds(waiting):
                with self._wake:
                    self._queue.discard(waiting)
                self._on_depth(self.depth)

    def admit(self, key: Hashable, rows: int) -> None:
        """Raises what `submit` would raise at once for such a job."""
        with self._wake:
            self._admit((key, rows))

    def check_room(self) -> None:
        """Raises Overloaded while the queue is full, whatever the job: a flood of requests can be turned away before
        they are read."""
        if (wait := self.full_for()) is not None:
            raise Overloaded(NO_ROOM, retry_after=wait)

    def full_for(self) -> float | None:
        """While the queue is full: seconds after which to come again. Costs no lock."""
        return self._full_wait if self._queue.length and self._clock() < self._full_until else None

    def _admit(self, key: Key) -> None:
        if self.death is not None:
            raise EngineDead("The engine has stopped; restart the service.")
        if self._draining:
            raise Draining("The service is shutting down; send the request to another replica.")
        if not self._queue.length:
            return  # what is larger than the whole bound is still answered, once the engine is free
        wait = self._wait()
        alike = len(self._queue.groups.get(key, ()))
        more = self._group_seconds(key, alike + 1) - self._group_seconds(key, alike)
        if wait + self._pace() * more > self._max_wait:
            # In the past where a large job finds no room in a queue that has some for small ones.
            self._full_until, self._full_wait = self._clock() + wait - NEARLY * self._max_wait, wait
            raise Overloaded(NO_ROOM, retry_after=max(wait, LEAST_WAIT))

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
        """Seconds until all that waits and runs is done."""
        with self._wake:
            return self._wait()

    def ahead(self, key: Hashable, rows: int) -> tuple[float, int]:
        """For a job submitted now: seconds until its batch begins, at worst, and the rows of others in that batch."""
        with self._wake:
            own = (key, rows)
            alike = len(self._queue.groups.get(own, ()))
            mates = alike % self._jobs_per_batch(rows)
            own_batch = self._group_seconds(own, alike) - self._group_seconds(own, alike - mates)
            return max(0.0, self._wait() - self._pace() * own_batch), mates * rows

    def _wait(self) -> float:
        waiting = sum(self._group_seconds(key, len(jobs)) for key, jobs in self._queue.groups.items())
        return self._running_seconds() + self._pace() * waiting

    def _running_seconds(self) -> float:
        return max(0.0, self._free_at - self._clock()) if self._running else 0.0

    def _pace(self) -> float:
        """How many times as long as reckoned work takes just now; 1 when nothing was done of late."""
        fade = 0.5 ** ((self._clock() - self._paced_at) / HALF_LIFE)
        return (PRIOR + fade * self._took) / (PRIOR + fade * self._reckoned)

    def _learn_pace(self, reckoned: float, took: float) -> None:
        fade = 0.5 ** ((self._clock() - self._paced_at) / HALF_LIFE)
        self._reckoned = fade * self._reckoned + reckoned
        self._took = fade * self._took + min(took, SLOWEST * reckoned)
        self._paced_at = self._clock()

    def _group_seconds(self, key: Key, jobs: int) -> float:
        """What so many jobs of one key usually take, in batches as full as they may be."""
        seconds = self._seconds.get((key, jobs))
        if seconds is None:
            most = self._jobs_per_batch(key[1])
            full, rest = divmod(jobs, most)
            seconds = full * self._cost(key[0], most * key[1]) if full else 0.0
            seconds += self._cost(key[0], rest * key[1]) if rest else 0.0
            self._seconds[key, jobs] = seconds
        return seconds

    def _jobs_per_batch(self, rows: int) -> int:
        return max(1, min(self._max_batch, self._max_rows // rows))

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
        began = self._clock()
        with self._wake:
            batch, dropped = self._take()
            self._running = batch
        self._on_depth(self.depth)
        _settle(dropped, repeat(DeadlineExceeded("The time budget ran out in the queue; allow more time.")))
        if not batch:
            return 0
        reckoned = self._cost(batch[0].job.key, batch[0].job.rows * len(batch))
        started = self._clock()
        try:
            results = self._run([waiting.job.payload for waiting in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"The engine gave {len(results)} answers to {len(batch)} requests.")
        except Exception as error:
            _settle(batch, repeat(error))
        else:
            _settle(batch, [(result, started - waiting.since) for waiting, result in zip(batch, results, strict=True)])
        with self._wake:
            self._running = []
            self._seconds.clear()  # costs are measured anew with every batch
            self._learn_pace(reckoned, self._clock() - began)
        return len(batch)

    def _take(self) -> tuple[list[_Waiting[T, R]], list[_Waiting[T, R]]]:
        """Remove and return the next batch, and those that are dropped before they cost anything: expired, gone, or
        sure to be late, because the batch takes longer than they have left."""
        batch: list[_Waiting[T, R]] = []
        dropped: list[_Waiting[T, R]] = []
        now = self._clock()
        while not batch and self._queue.length:
            group = self._queue.oldest_group()
            (key, rows), most = group[0].key, self._jobs_per_batch(group[0].job.rows)
            end = now + self._pace() * self._cost(key, rows * min(most, len(group)))
            for waiting in group:
                if len(batch) == most:
                    break
                self._queue.discard(waiting)
                late = waiting.deadline is not None and waiting.deadline <= end
                (dropped if late or waiting.future.done() else batch).append(waiting)
            self._free_at = end
        return batch, dropped

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self.death = error
            left = self._running + [waiting for group in self._queue.groups.values() for waiting in group.values()]
            self._queue, self._running = _Queue(), []
        _settle(left, repeat(EngineDead("The engine has stopped; restart the service.")))
        self._on_death(error)


def _settle(jobs: Sequence[_Waiting[T, R]], outcomes: Iterable[tuple[R, float] | Exception]) -> None:
    """Answer jobs on their own loops, unless they were answered or cancelled before. One wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[tuple[R, float]], Any]]] = {}
    for waiting, outcome in zip(jobs, outcomes, strict=False):  # one error, repeated, may stand for all
        by_loop.setdefault(waiting.loop, []).append((waiting.future, outcome))

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
