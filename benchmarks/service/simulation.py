"""A service in simulated time (simpy): arrivals, caches, queues and batches of any number of replicas, and what their
users would see. Service times come in as `ServiceTimes`; what enters, waits and shares a batch is decided by the
service's own `Admission`, run on the simulation's clock.

Left out: what event loop and engine thread take from each other beyond what the measured times hold, and everything
outside the pods.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from benchmarks.quantiles import rounded
from benchmarks.service.traffic import BUDGET_MS, Request, Traffic
from serving.errors import DeadlineExceeded, Overloaded
from serving.online.admission import Admission, Demand, Job
from serving.online.costs import CostTable

MAX_STEPS, K = 4, 10
DEFAULT_BUDGET = 10.0  # seconds, of requests that name none

Series = Sequence[tuple[float, float]]  # (second of the measurement, value), in order of time


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds. A search of n requests takes (base + slope * n * beam width) times its noise."""

    search: dict[int, tuple[float, float]]  # steps -> (base, seconds per beam row)
    encode: tuple[float, float]  # (base, per history) of a batch in which something had to be encoded
    noise: Series  # measured / typical time of single batches
    overhead: Series  # seconds of a request outside queue and engine
    auto_steps: tuple[int, ...] = tuple(range(MAX_STEPS + 1))  # those that `auto` may take, fewest first

    def typical(self, steps: int, rows: int) -> float:
        base, slope = self.search[min(self.search, key=lambda known: abs(known - steps))]
        return base + slope * rows


class Replay:
    """A series repeated from a random second on: a value is drawn from those within a second of the present.

    Drawn from the whole series, slow moments would be spread out: a machine that is slow for a second makes a queue,
    the same number of slow moments apart from each other makes none.
    """

    def __init__(self, series: Series, rng: random.Random) -> None:
        self._at, self._values, self._rng = [at for at, _ in series], [value for _, value in series], rng
        self._length = self._at[-1] + 1e-9
        self._begin = rng.random() * self._length

    def now(self, seconds: float) -> float:
        at = (seconds + self._begin) % self._length
        first, after = bisect(self._at, at - 1), bisect(self._at, at + 1)
        return self._values[self._rng.randrange(first, after) if first < after else min(first, len(self._values) - 1)]


@dataclass(frozen=True)
class Setting:
    """A simulated deployment. The limits are the service's own settings."""

    rate: float
    seconds: float
    replicas: int = 1
    users: int = 5000
    skew: float = 1.0
    affine: bool = True  # all requests of a user reach the same replica
    redis_seconds: float | None = None  # of a look-up; None: no Redis
    memory_users: int = 10_000
    beam_width: int = 50
    max_batch: int = 16
    max_rows: int = 1600
    max_wait: float = 1.0
    warm_up: float = 0.1  # share of the time that does not count
    seed: int = 0


@dataclass(slots=True, eq=False)
class _Visit:
    """A request that was let in: its outcome is the event's value, whether it was answered."""

    missed: bool
    done: simpy.Event


@dataclass(slots=True)
class Outcome:
    """What a simulation found. `busy`: share of the time in which the replicas' engines worked."""

    sent: int = 0
    seconds: list[float] = field(default_factory=list)
    rejected: int = 0
    busy: float = 0.0
    cache: Counter[str] = field(default_factory=Counter)
    batches: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Milliseconds and shares."""
        milliseconds = [1000 * seconds for seconds in self.seconds]
        return {
            **{f"p{percent}_ms": rounded(milliseconds, percent / 100, digits=1) for percent in (50, 95, 99)},
            "rejected": round(self.rejected / max(1, self.sent), 4),
            "cached": round(1 - self.cache["miss"] / max(1, self.cache.total()), 4),
            "busy": round(self.busy, 4),
            "batch": round(sum(self.batches) / max(1, len(self.batches)), 2),
        }


def simulate(costs: ServiceTimes, setting: Setting) -> Outcome:
    """Simulates `setting.seconds`; requests that arrive after the warm-up count, and all of them are answered."""
    env, rng, outcome = simpy.Environment(), random.Random(setting.seed), Outcome()
    traffic = Traffic(setting.users, 1, setting.skew, setting.seed)
    redis: dict[int, int] = {}
    replicas = [Replica(env, costs, setting, redis, outcome, rng) for _ in range(setting.replicas)]

    def arrivals() -> Any:
        while env.now < setting.seconds:
            yield env.timeout(rng.expovariate(setting.rate))
            request = traffic.next()
            chosen = request.user % setting.replicas if setting.affine else rng.randrange(setting.replicas)
            env.process(replicas[chosen].request(request, env.now >= setting.warm_up * setting.seconds))

    env.process(arrivals())
    env.run()
    outcome.busy = sum(replica.busy for replica in replicas) / (setting.replicas * env.now)
    return outcome


class Replica:
    """One process of the service: in-process cache, admission, and the one thread that owns the device."""

    def __init__(
        self,
        env: simpy.Environment,
        costs: ServiceTimes,
        setting: Setting,
        redis: dict[int, int],
        outcome: Outcome,
        rng: random.Random,
    ) -> None:
        self.env, self.costs, self.setting, self.outcome = env, costs, setting, outcome
        self.noise, self.overhead = Replay(costs.noise, rng), Replay(costs.overhead, rng)
        self.in_process: OrderedDict[int, int] = OrderedDict()  # user -> version of the history that was encoded
        self.redis = redis
        self.busy = 0.0
        self.table = CostTable(clock=lambda: env.now)
        self.admission: Admission[_Visit] = Admission(
            self.table,
            max_batch=setting.max_batch,
            max_rows=setting.max_rows,
            max_wait=setting.max_wait,
            clock=lambda: env.now,
        )
        self.wake = env.event()
        for steps in range(MAX_STEPS + 1):  # as the service does before it is ready
            for power in range(setting.max_batch.bit_length()):
                rows = setting.beam_width * 2**power
                self.table.observe(steps, rows, costs.typical(steps, rows))
        env.process(self._engine())

    # A request, in the order of serving.online.recommender

    def request(self, request: Request, counted: bool) -> Any:
        env, started = self.env, self.env.now
        self.outcome.sent += counted
        demand = self._demand(request, started)
        try:
            self.admission.decide()
            self.admission.decide(demand)
            found = self._look_up(request)
            if counted:
                self.outcome.cache[found] += 1
            if self.setting.redis_seconds is not None and found != "memory":
                yield env.timeout(self.setting.redis_seconds)
            plan = self.admission.decide(demand)
        except (Overloaded, DeadlineExceeded):
            self.outcome.rejected += counted
            return
        assert plan is not None
        visit = _Visit(found == "miss", env.event())
        self.admission.enter(visit, plan, demand.deadline)
        if not self.wake.triggered:
            self.wake.succeed()
        if not (yield visit.done):
            self.outcome.rejected += counted
            return
        self._keep(request)
        yield env.timeout(self.overhead.now(env.now))
        if counted:
            self.outcome.seconds.append(env.now - started)

    def _demand(self, request: Request, now: float) -> Demand:
        if isinstance(request.steps, int):
            return Demand(request.steps, self.setting.beam_width, now + DEFAULT_BUDGET)
        most, *fewer = reversed(self.costs.auto_steps)
        deadline = now + BUDGET_MS / 1000
        return Demand(most, self.setting.beam_width, deadline, flexible=True, fewer=fewer, min_beam_width=K)

    def _look_up(self, request: Request) -> str:
        if self.in_process.get(request.user) == request.version:
            self.in_process.move_to_end(request.user)
            return "memory"
        return "redis" if self.redis.get(request.user) == request.version else "miss"

    def _keep(self, request: Request) -> None:
        self.in_process[request.user] = request.version
        self.in_process.move_to_end(request.user)
        if len(self.in_process) > self.setting.memory_users:
            self.in_process.popitem(last=False)
        if self.setting.redis_seconds is not None:
            self.redis[request.user] = request.version

    # The engine's thread, as serving.online.batcher has it

    def _engine(self) -> Any:
        while True:
            batch, dropped = self.admission.take()
            for job in dropped:
                job.payload.done.succeed(False)
            if not batch:
                self.wake = self.env.event()
                yield self.wake
                continue
            seconds = self._service_time(batch)
            yield self.env.timeout(seconds)
            self.busy += seconds
            plan = batch[0].plan
            self.table.observe(plan.steps, plan.beam_width * len(batch), seconds)
            self.admission.finish()
            self.outcome.batches.append(len(batch))
            for job in batch:
                job.payload.done.succeed(True)

    def _service_time(self, batch: Sequence[Job[_Visit]]) -> float:
        plan, misses = batch[0].plan, sum(job.payload.missed for job in batch)
        base, each = self.costs.encode
        encode = base + each * misses if misses else 0.0
        typical = self.costs.typical(plan.steps, plan.beam_width * len(batch))
        return (encode + typical) * self.noise.now(self.env.now)
