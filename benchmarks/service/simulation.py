"""A service in simulated time (simpy): arrivals, caches, queues and batches of any number of replicas, and what users
would have seen. Service times come in as `Costs`; the queue's rules are those of serving/online/batcher.py and
app/lifecycle.py, and its estimates those of the real `Planner`.

Left out: what event loop and engine thread take from each other beyond what the measured times hold, and anything
outside of the pods.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from benchmarks.service.traffic import BUDGET_MS, Ask, Traffic
from serving.online.planner import TYPICAL, Planner

MAX_STEPS, K = 4, 10
DEFAULT_BUDGET = 10.0  # seconds, of requests that name none

Key = tuple[int, int]  # steps, beam width: what may share a batch


Series = Sequence[tuple[float, float]]  # (second of the measurement, value), in order of time


@dataclass(frozen=True)
class Costs:
    """Service times, seconds. A search of n requests takes (base + slope * n * beam width) times its `noise`."""

    search: dict[int, tuple[float, float]]  # steps -> (base, seconds per beam row)
    encode: tuple[float, float]  # (base, per history) of a batch in which something had to be encoded
    noise: Series  # measured time / typical time, of single batches
    overhead: Series  # what a request spends outside of queue and engine

    def typical(self, steps: int, rows: int) -> float:
        base, slope = self.search[min(self.search, key=lambda known: abs(known - steps))]
        return base + slope * rows


class Replay:
    """A series as it came, over and over, begun at a random second: a value is drawn from those within a second of now.

    Drawn from all of them, slow moments would lose their company: a machine that is slow for a second makes a queue,
    and as many slow moments apart make none.
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
    """What is simulated. The limits are the service's own settings."""

    rate: float
    seconds: float
    replicas: int = 1
    users: int = 5000
    skew: float = 1.0
    affine: bool = True  # a user's requests reach one replica
    redis_seconds: float | None = None  # time of a look-up; None: no Redis
    memory_users: int = 10_000
    beam_width: int = 50
    max_batch: int = 16
    max_rows: int = 1600
    max_wait: float = 1.0
    warm_up: float = 0.1  # share of the time that is not counted
    seed: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    ask: Ask
    since: float
    deadline: float
    missed: bool
    done: simpy.Event
    key: Key = (0, 0)
    late: bool = False


@dataclass(slots=True)
class Outcome:
    """What came of a simulated time. `busy`: share of the time that the replicas' engines worked."""

    sent: int = 0
    seconds: list[float] = field(default_factory=list)
    rejected: int = 0
    busy: float = 0.0
    cache: Counter[str] = field(default_factory=Counter)
    batches: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Milliseconds and shares."""
        ordered = sorted(self.seconds)

        def quantile(share: float) -> float | None:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else None

        return {
            "p50_ms": quantile(0.5),
            "p95_ms": quantile(0.95),
            "p99_ms": quantile(0.99),
            "rejected": round(self.rejected / max(1, self.sent), 4),
            "cached": round(1 - self.cache["miss"] / max(1, self.cache.total()), 4),
            "busy": round(self.busy, 4),
            "batch": round(sum(self.batches) / max(1, len(self.batches)), 2),
        }


def simulate(costs: Costs, setting: Setting) -> Outcome:
    """Lets so many seconds pass; requests that arrived after the warm-up are counted, and answered to the last."""
    env, rng, outcome = simpy.Environment(), random.Random(setting.seed), Outcome()
    traffic = Traffic(setting.users, 1, setting.skew, setting.seed)
    redis: dict[int, int] = {}
    replicas = [Replica(env, costs, setting, redis, outcome, rng) for _ in range(setting.replicas)]

    def arrivals() -> Any:
        while env.now < setting.seconds:
            yield env.timeout(rng.expovariate(setting.rate))
            ask = traffic.next()
            place = ask.user if setting.affine else rng.randrange(setting.replicas)
            env.process(replicas[place % setting.replicas].request(ask, env.now >= setting.warm_up * setting.seconds))

    env.process(arrivals())
    env.run()
    outcome.busy = sum(replica.busy for replica in replicas) / (setting.replicas * env.now)
    return outcome


class Replica:
    """One process of the service: memory cache, planner, queue, and the one thread that owns the device."""

    def __init__(
        self,
        env: simpy.Environment,
        costs: Costs,
        setting: Setting,
        redis: dict[int, int],
        outcome: Outcome,
        rng: random.Random,
    ) -> None:
        self.env, self.costs, self.setting, self.outcome = env, costs, setting, outcome
        self.noise, self.overhead = Replay(costs.noise, rng), Replay(costs.overhead, rng)
        self.memory: OrderedDict[int, int] = OrderedDict()  # user -> version of the history that was encoded
        self.redis = redis
        self.planner = Planner(clock=lambda: env.now)
        self.groups: dict[Key, list[_Job]] = {}
        self.free_at = self.busy = 0.0
        self.running = False
        self.wake = env.event()
        for steps in range(MAX_STEPS + 1):  # as the service does before it is ready
            for power in range(setting.max_batch.bit_length()):
                rows = setting.beam_width * 2**power
                self.planner.observe(steps, rows, costs.typical(steps, rows))
        env.process(self._engine())

    # A request

    def request(self, ask: Ask, counted: bool) -> Any:
        env, started = self.env, self.env.now
        self.outcome.sent += counted
        budget = BUDGET_MS / 1000 if ask.steps == "auto" else DEFAULT_BUDGET
        found = self._look_up(ask)
        if counted:
            self.outcome.cache[found] += 1
        if self.setting.redis_seconds is not None and found != "memory":
            yield env.timeout(self.setting.redis_seconds)
        key = self._plan(ask.steps, started + budget - env.now)
        if key is None or not self._admits(key):
            self.outcome.rejected += counted
            return
        job = _Job(ask, env.now, started + budget, found == "miss", env.event(), key)
        self.groups.setdefault(key, []).append(job)
        if not self.wake.triggered:
            self.wake.succeed()
        yield job.done
        if job.late:
            self.outcome.rejected += counted
            return
        self._keep(ask)
        yield env.timeout(self.overhead.now(env.now))
        if counted:
            self.outcome.seconds.append(env.now - started)

    def _look_up(self, ask: Ask) -> str:
        if self.memory.get(ask.user) == ask.version:
            self.memory.move_to_end(ask.user)
            return "memory"
        return "redis" if self.redis.get(ask.user) == ask.version else "miss"

    def _keep(self, ask: Ask) -> None:
        self.memory[ask.user] = ask.version
        self.memory.move_to_end(ask.user)
        if len(self.memory) > self.setting.memory_users:
            self.memory.popitem(last=False)
        if self.setting.redis_seconds is not None:
            self.redis[ask.user] = ask.version

    def _plan(self, steps: int | str, left: float) -> Key | None:
        beam = self.setting.beam_width
        if isinstance(steps, str):
            beams = sorted({beam, max(K, beam // 2), K}, reverse=True)
            return self.planner.choose(left, self._ahead, MAX_STEPS, beams)
        wait, beside = self._ahead(steps, beam)
        fits = wait + self.planner.estimate(steps, beside + beam, TYPICAL) <= left
        return (steps, beam) if fits else None

    # The queue, as serving/online/batcher.py has it

    def _admits(self, key: Key) -> bool:
        if not self.groups:
            return True
        alike = len(self.groups.get(key, ()))
        more = self._group_seconds(key, alike + 1) - self._group_seconds(key, alike)
        return self._wait() + more <= self.setting.max_wait

    def _ahead(self, steps: int, beam_width: int) -> tuple[float, int]:
        key = (steps, beam_width)
        alike = len(self.groups.get(key, ()))
        mates = alike % self._most(key)
        earlier = self._group_seconds(key, alike - mates) - self._group_seconds(key, alike)
        return max(0.0, self._wait() + earlier), mates * beam_width

    def _wait(self) -> float:
        running = max(0.0, self.free_at - self.env.now) if self.running else 0.0
        return running + sum(self._group_seconds(key, len(jobs)) for key, jobs in self.groups.items())

    def _group_seconds(self, key: Key, jobs: int) -> float:
        most = self._most(key)
        full, rest = divmod(jobs, most)
        seconds = full * self._estimate(key, most) if full else 0.0
        return seconds + (self._estimate(key, rest) if rest else 0.0)

    def _estimate(self, key: Key, jobs: int) -> float:
        return self.planner.estimate(key[0], jobs * key[1], TYPICAL)

    def _most(self, key: Key) -> int:
        return max(1, min(self.setting.max_batch, self.setting.max_rows // key[1]))

    def _take(self) -> list[_Job]:
        """The next batch, of the key whose oldest job has waited longest; what would be late is dropped before."""
        while self.groups:
            key = min(self.groups, key=lambda one: self.groups[one][0].since)
            waiting, most = self.groups.pop(key), self._most(key)
            end = self.env.now + self._estimate(key, min(most, len(waiting)))
            batch: list[_Job] = []
            while waiting and len(batch) < most:
                job = waiting.pop(0)
                job.late = job.deadline <= end
                if job.late:
                    job.done.succeed()
                else:
                    batch.append(job)
            if waiting:
                self.groups[key] = waiting
            self.free_at = end
            if batch:
                return batch
        return []

    def _engine(self) -> Any:
        while True:
            batch = self._take()
            if not batch:
                self.wake = self.env.event()
                yield self.wake
                continue
            steps, rows = batch[0].key[0], batch[0].key[1] * len(batch)
            seconds = self._service_time(steps, rows, sum(job.missed for job in batch))
            self.running = True
            yield self.env.timeout(seconds)
            self.running = False
            self.busy += seconds
            self.planner.observe(steps, rows, seconds)
            self.outcome.batches.append(len(batch))
            for job in batch:
                job.done.succeed()

    def _service_time(self, steps: int, rows: int, misses: int) -> float:
        base, each = self.costs.encode
        encode = base + each * misses if misses else 0.0
        return (encode + self.costs.typical(steps, rows)) * self.noise.now(self.env.now)
