"""May a request enter, when does it run, and with how many steps: one pure class with a clock, and one `decide()`.

Knows no thread, no event loop, no model and no HTTP. The load shedder asks it before a request is read, the recommender
before anything is looked up, the batcher when a request joins the queue; the capacity simulation runs the same class.

The queue is bounded by the seconds of work in it, not by the number of requests:

    wait = what is left of the running batch + pace * sum over plans of cost(requests waiting with that plan)
    pace = measured batch time, gaps included, divided by the prediction; exponentially decayed

Without the pace, a flood of requests, which takes cores and locks from the engine within milliseconds, would let the
queue hold twice its bound, and answers would come too late.

Clients share the engine by start-time fair queueing. In virtual time, which runs with the work that is done, a job
starts where its client's last one ends, or now if that has passed; the job that starts first runs first:

    start = max(virtual time, end of the client's last job)        end = start + cost

So a client with a long queue of its own delays the others by one batch, not by its queue, and the wait that bounds a
client's queue counts only what runs before its next job. One client alone is served in the order of arrival.

Beside others, a client with a queue has a part of each batch, and they will ask again before its turn comes. So it
waits longer than its queue is, if its deadlines permit: how long is seen from the recent speed of virtual time.

    wait >= (start - virtual time) / speed        speed = virtual time passed / measured batch time; decayed as the pace
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

from serving.errors import DeadlineExceeded, Draining, EngineDead, NotReady, Overloaded
from serving.online.costs import LIKELY, TYPICAL

T = TypeVar("T")
# In the order in which they follow.
State = Literal["loading", "warming", "replaying", "ready", "draining", "engine dead"]

DEAD = "The engine has stopped; restart the service."
QUEUE_FULL = "The queue is full; try again later."
NEVER = (-math.inf, 0.0)
NEWCOMER = object()  # stands for every client that is not active: what one of them is refused, all are
MIN_RETRY_AFTER = 0.05  # seconds
REOPEN_AT = 0.9  # share of the bound: a queue that was full stays closed until its work has come down to this
PACE_HALF_LIFE = 1.0  # seconds
ESTIMATES_KEPT_S = 0.1  # estimated costs; one batch more hardly changes them, and every request needs several
PACE_PRIOR = 0.1  # seconds of work at pace 1 that are always assumed to have just been done
MAX_SLOWDOWN = 4.0  # a batch counts at most this many times its prediction: a machine that stalled once is not slow
ACTIVE_FOR = 1.0  # seconds after its last request in which a client counts as active
PATIENCE_S = 0.003  # longest the engine idles for a client that has just been answered
MAX_REFUSED = 10_000  # clients remembered as refused; beyond that, all are asked again
WAIT_SAFETY_FACTOR = 1.25  # on the estimated wait: a request let in and answered too late was computed for nothing


class Plan(NamedTuple):
    """What a search runs with. Requests of equal plans may share a batch. `model`: the version that answers. `variant`:
    whatever else they must share. `searches`: how many of so many beams a request makes."""

    steps: int
    beam_width: int
    variant: Hashable = None
    model: str = ""
    searches: int = 1

    @property
    def beam_rows(self) -> int:
        return self.beam_width * self.searches


@dataclass(slots=True)
class Demand:
    """What a request wants: so many steps and beams by `deadline`, a time of the clock.

    A flexible demand accepts the numbers of steps in `fewer`, most first, and beams down to `min_beam_width`, where the
    deadline or the queue asks for it. `client`: whose share of the engine it takes.
    """

    steps: int
    beam_width: int
    deadline: float = math.inf
    flexible: bool = False
    fewer: Sequence[int] = ()
    min_beam_width: int = 1
    variant: Hashable = None
    model: str = ""
    client: Hashable = None
    searches: int = 1

    def plans(self) -> Iterator[Plan]:
        """The plans it accepts, largest first. Steps give way before beams do: a narrow beam can miss good items, and
        fewer steps cost little accuracy."""
        widths = narrower_beams(self.beam_width, self.min_beam_width) if self.flexible else [self.beam_width]
        for width in widths:
            for steps in (self.steps, *self.fewer):
                yield Plan(steps, width, self.variant, self.model, self.searches)


def narrower_beams(beam_width: int, least: int) -> list[int]:
    """The beam widths a flexible request may run with, widest first."""
    return sorted({beam_width, max(least, beam_width // 2), least}, reverse=True)


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """A request that was let in. Set `abandoned` when nobody waits for its answer any longer."""

    payload: T
    plan: Plan
    deadline: float
    since: float
    number: int
    client: Hashable = None
    start: float = 0.0
    cost: float = 0.0
    waiting: bool = True
    abandoned: bool = False


@dataclass(slots=True)
class ClientFlow:
    """What fair queueing needs to know of an active client: the virtual times at which its last job starts and its
    work ends, what that job costs, how many of its jobs wait, and when it last came."""

    start: float = 0.0
    end: float = 0.0
    cost: float = 0.0
    waiting: int = 0
    seen: float = 0.0


class Costs(Protocol):
    """The seconds within which `quantile` of a model's batches with so many steps and beam rows finish."""

    def estimate(self, steps: int, rows: int, quantile: float, model: str) -> float: ...


class Admission(Generic[T]):
    """The queue and its rules. Not thread-safe, but for `advance` and `decide()` without a demand.

    max_batch: searches in a batch. max_rows: beam rows in a batch. max_wait: bound of the queue, in seconds of the
    work that waits and runs.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        max_batch: int,
        max_rows: int,
        max_wait: float,
        clock: Callable[[], float] = time.monotonic,
        state: State = "ready",
    ) -> None:
        self.state, self.clock = state, clock
        self._advancing = threading.Lock()
        self._costs, self._max_batch, self._max_rows, self._max_wait = costs, max_batch, max_rows, max_wait
        self._waiting: dict[Plan, dict[int, Job[T]]] = {}  # within a plan by number, so oldest first
        self._depth = 0
        self._numbers = itertools.count()
        self._seconds: dict[tuple[Plan, int, float], float] = {}  # of batches, as estimated lately; see _batch_seconds
        self._estimated_at = 0.0  # the oldest of these
        self._running: list[Job[T]] = []
        self._began = self._ends = 0.0  # when the running batch was taken, and when it should be done
        self._answered: set[Hashable] = set()  # clients of the last batch
        self._prediction = 0.0  # seconds, of the running batch
        self._predicted, self._took, self._paced_at = 0.0, 0.0, 0.0  # decayed sums, for the pace
        self._virtual = 0.0  # seconds of work, at its cost when it entered
        self._progress = 0.0  # of virtual time; a decayed sum, as `_took`
        self._flows: dict[Hashable, ClientFlow] = {}  # of active clients, the last to come last
        self._refused: dict[Hashable, tuple[float, float]] = {}  # client -> until when the queue is full, and the wait

    # May it enter?

    def advance(self, state: State) -> None:
        """Moves on to a later state; never back, so that a service told to drain while it loads stays draining."""
        order = get_args(State)
        with self._advancing:
            if order.index(state) > order.index(self.state):
                self.state = state

    def check_open(self) -> None:
        """Raises NotReady, Draining or EngineDead, whatever keeps every request out."""
        match self.state:
            case "loading" | "warming":
                raise NotReady(f"The model is {self.state}; try again shortly.")
            case "replaying":
                raise NotReady("What was changed since the model was made is being replayed; try again shortly.")
            case "draining":
                raise Draining("The service is shutting down; send the request to another replica.")
            case "engine dead":
                raise EngineDead(DEAD)

    def decide(self, demand: Demand | None = None, client: Hashable = None) -> Plan | None:
        """The plan with which a request may enter now, the largest that fits both the deadline and the queue.

        Without a demand: whether any request of the client may enter, from what earlier decisions found, so that under
        a flood most requests are turned away at almost no cost. Returns None then.

        Raises Overloaded (come back later), DeadlineExceeded (not even an idle engine could meet the deadline),
        NotReady, Draining, EngineDead.
        """
        self.check_open()
        now = self.clock()
        if demand is None:
            until, wait = self._refused.get(client if client in self._flows else NEWCOMER, NEVER)
            if self._depth and now < until:
                raise Overloaded(QUEUE_FULL, wait)
            return None
        left = demand.deadline - now
        if left <= 0:
            raise DeadlineExceeded("The time budget was used up before the search began; allow more time.")
        self._forget_estimates(now)
        before, pace = self._before(demand.client), self._pace()
        work, in_time = self._seconds_of(before, pace), False
        wait = max(work, self._seconds_to_turn(demand.client))
        for plan in demand.plans():
            mates = before.get(plan, 0) % self._jobs_per_batch(plan)
            if self._meets_deadline(plan, mates, wait, pace, left, demand.flexible):
                if self._has_room(plan, mates, work, pace):
                    return plan
                in_time = True
        if not in_time and all(self._batch_seconds(plan, 1, _quantile(demand)) > left for plan in demand.plans()):
            raise DeadlineExceeded(
                "No permitted number of steps and beams fits this time budget; allow more, or use auto."
            )
        wait = max(wait, MIN_RETRY_AFTER)
        if in_time or wait > self._max_wait:
            # Already in the past where a large job finds no room in a queue that has some for small ones. Never longer
            # than a queue at its bound takes to come down: a slow moment, in which it seemed longer, may have passed.
            closed = min(wait - REOPEN_AT * self._max_wait, (1 - REOPEN_AT) * self._max_wait)
            self._refuse(demand.client, now + closed, wait)
            raise Overloaded(QUEUE_FULL, wait)
        raise Overloaded("The queue is too long for this time budget; try again later, or allow more time.", wait)

    def _refuse(self, client: Hashable, until: float, wait: float) -> None:
        if len(self._refused) >= MAX_REFUSED:
            self._refused.clear()
        self._refused[client if client in self._flows else NEWCOMER] = until, wait

    def _meets_deadline(self, plan: Plan, mates: int, wait: float, pace: float, left: float, flexible: bool) -> bool:
        """mates: the jobs before it in its batch."""
        if left == math.inf:
            return True
        ahead = max(0.0, wait - pace * self._batch_seconds(plan, mates))  # until its batch begins, at worst
        # A fixed plan on an idle engine is tried if it usually fits: refusing it would help nobody.
        seconds = self._batch_seconds(plan, mates + 1, LIKELY if flexible or ahead else TYPICAL)
        return WAIT_SAFETY_FACTOR * ahead + seconds <= left

    def _has_room(self, plan: Plan, mates: int, work: float, pace: float) -> bool:
        if not self._depth:
            return True  # work larger than the whole bound is still done, once the engine is free
        more = self._batch_seconds(plan, mates + 1) - self._batch_seconds(plan, mates)
        return work + pace * more <= self._max_wait

    def _before(self, client: Hashable) -> dict[Plan, int]:
        """How many jobs of each plan run before a job of the client that enters now."""
        flow = self._flows.get(client)
        if flow is not None and flow.waiting == self._depth:  # nobody else waits
            return {plan: len(group) for plan, group in self._waiting.items()}
        start = self._start(flow)
        return {plan: sum(job.start <= start for job in group.values()) for plan, group in self._waiting.items()}

    def _seconds_to_turn(self, client: Hashable) -> float:
        """Seconds until virtual time reaches the start of a job of the client that enters now, at its present speed."""
        flow = self._flows.get(client)
        if flow is None or len(self._flows) == 1:
            return 0.0
        decay = self._decay()
        speed = (PACE_PRIOR + decay * self._progress) / (PACE_PRIOR + decay * self._took)
        return self._left_to_run() + (self._start(flow) - self._virtual) / speed

    def _start(self, flow: ClientFlow | None) -> float:
        if flow is None:
            return self._virtual
        return max(self._virtual, flow.end, flow.start if flow.waiting else 0.0)

    # The queue

    def enter(self, payload: T, plan: Plan, deadline: float = math.inf, client: Hashable = None) -> Job[T]:
        """Puts a request that `decide` let in into the queue."""
        now = self.clock()
        flow = self._flows.pop(client, None) or ClientFlow()
        self._flows[client] = flow
        job = Job(payload, plan, deadline, now, next(self._numbers), client)
        job.start, job.cost = self._start(flow), self._group_seconds(plan, 1)
        flow.start, flow.end, flow.cost, flow.seen = job.start, job.start + job.cost, job.cost, now
        flow.waiting += 1
        self._waiting.setdefault(plan, {})[job.number] = job
        self._depth += 1
        return job

    def leave(self, job: Job[T]) -> None:
        """Takes a job out of the queue, if it is still in it. It does not run, and costs its client nothing."""
        if job.waiting:
            self._remove(job)
            self._flows[job.client].end -= job.cost

    def _remove(self, job: Job[T]) -> None:
        if job.waiting:
            job.waiting = False
            self._depth -= 1
            self._flows[job.client].waiting -= 1
            group = self._waiting[job.plan]
            del group[job.number]
            if not group:
                del self._waiting[job.plan]

    def take(self) -> tuple[list[Job[T]], list[Job[T]]]:
        """Removes and returns the next batch, and the jobs dropped before they cost anything: abandoned ones, and
        those sure to be late because the batch takes longer than they have left.

        The batch is of the plan that has the job that starts first: no plan starves, however busy the others are. While
        a client is active that does not fill its part of a batch, no client has more in it than the one that asks for
        least has waiting, or than its next request, which may come while the batch runs.
        """
        batch: list[Job[T]] = []
        dropped: list[Job[T]] = []
        now = self._began = self.clock()
        while not batch and self._depth:
            group = min(map(_in_order, self._waiting.values()), key=lambda jobs: (jobs[0].start, jobs[0].number))
            plan = group[0].plan
            chosen = self._chosen(plan, group)
            self._ends = now + self._pace() * self._batch_seconds(plan, len(chosen))
            late = [job for job in chosen if job.abandoned or job.deadline <= self._ends]
            for job in late:
                self.leave(job)
            dropped += late
            if late:
                continue  # others may take their places
            for job in chosen:
                self._remove(job)
            batch = chosen
            reached = max(self._virtual, batch[0].start)
            self._progress += reached - self._virtual
            self._virtual = reached
        self._running = batch
        self._prediction = self._batch_seconds(batch[0].plan, len(batch)) if batch else 0.0
        self._forget_clients(now)
        return batch, dropped

    def _chosen(self, plan: Plan, group: list[Job[T]]) -> list[Job[T]]:
        """The jobs that share the next batch, from those of one plan in their order."""
        most = self._jobs_per_batch(plan)
        light = [flow for flow in self._flows.values() if flow.waiting * len(self._flows) < most]
        if len(self._flows) == 1 or not light:
            return group[:most]
        most_seconds, each = max(flow.cost for flow in light), 1
        while each < most and self._group_seconds(plan, each + 1) <= most_seconds:
            each += 1
        each *= max(1, min(flow.waiting for flow in light))
        chosen: list[Job[T]] = []
        counts: dict[Hashable, int] = {}
        for job in group:
            counts[job.client] = counts.get(job.client, 0) + 1
            if counts[job.client] <= each:
                chosen.append(job)
                if len(chosen) == most:
                    break
        return chosen

    def patience(self) -> float:
        """Seconds for which the engine should wait before it takes a batch, though there is one.

        Clients that send their next request once they have an answer come back a moment too late. Without a pause,
        whoever keeps a queue would have every other turn, however many the others are.
        """
        if len(self._flows) == 1:
            return 0.0
        queued = [flow.cost for flow in self._flows.values() if flow.waiting > 1]
        expected = sum(flow is not None and not flow.waiting for flow in map(self._flows.get, self._answered))
        if not 1 <= len(queued) <= expected:
            return 0.0
        return self._paced_at + min(PATIENCE_S, self._pace() * max(queued) / 2) - self.clock()

    def _forget_clients(self, now: float) -> None:
        """Drops those that have not come for a while."""
        for client, flow in list(
            itertools.takewhile(lambda each: each[1].seen < now - ACTIVE_FOR, self._flows.items())
        ):
            if not flow.waiting:
                del self._flows[client]
                self._refused.pop(client, None)

    def finish(self) -> None:
        """The batch that `take` returned has run, or has failed."""
        self._answered, self._running = {job.client for job in self._running}, []
        now = self.clock()
        self._forget_estimates(now)
        decay = self._decay()
        self._progress *= decay
        self._predicted = decay * self._predicted + self._prediction
        self._took = decay * self._took + min(now - self._began, MAX_SLOWDOWN * self._prediction)
        self._paced_at = now

    def clear(self) -> list[Job[T]]:
        """Removes and returns every job, running ones included: the engine has died."""
        waiting = [job for group in self._waiting.values() for job in group.values()]
        for job in waiting:
            self.leave(job)
        jobs, self._running = self._running + waiting, []
        return jobs

    # What the queue looks like

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return self._depth

    def _seconds_of(self, jobs: dict[Plan, int], pace: float) -> float:
        """Seconds until so many jobs of each plan are done, and what runs before them."""
        work = sum(self._group_seconds(plan, count) for plan, count in jobs.items())
        return self._left_to_run() + pace * work

    def _left_to_run(self) -> float:
        """Seconds until the running batch is done."""
        return max(0.0, self._ends - self.clock()) if self._running else 0.0

    @property
    def prediction(self) -> float:
        """Seconds that the running batch should take, or the last one did."""
        return self._prediction

    def _pace(self) -> float:
        decay = self._decay()
        return (PACE_PRIOR + decay * self._took) / (PACE_PRIOR + decay * self._predicted)

    def _decay(self) -> float:
        """What is left of the measurements up to the last batch."""
        left: float = 0.5 ** ((self.clock() - self._paced_at) / PACE_HALF_LIFE)
        return left

    def _group_seconds(self, plan: Plan, jobs: int) -> float:
        """What so many jobs of one plan usually take, in batches as full as they may be."""
        most = self._jobs_per_batch(plan)
        full, rest = divmod(jobs, most)
        return full * self._batch_seconds(plan, most) + self._batch_seconds(plan, rest)

    def _batch_seconds(self, plan: Plan, jobs: int, quantile: float = TYPICAL) -> float:
        """Within so many seconds `quantile` of such batches finish."""
        if not jobs:
            return 0.0
        seconds = self._seconds.get((plan, jobs, quantile))
        if seconds is None:
            seconds = self._costs.estimate(plan.steps, jobs * plan.beam_rows, quantile, plan.model)
            self._seconds[plan, jobs, quantile] = seconds
        return seconds

    def _forget_estimates(self, now: float) -> None:
        if now >= self._estimated_at + ESTIMATES_KEPT_S:
            self._seconds.clear()
            self._estimated_at = now

    def _jobs_per_batch(self, plan: Plan) -> int:
        return max(1, min(self._max_batch, self._max_rows // plan.beam_rows))


def _in_order(group: dict[int, Job[T]]) -> list[Job[T]]:
    return sorted(group.values(), key=lambda job: (job.start, job.number))


def _quantile(demand: Demand) -> float:
    return LIKELY if demand.flexible else TYPICAL
