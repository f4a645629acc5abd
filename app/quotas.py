"""Quotas per client: counted in Redis if there is one, so that replicas share the count, else in process.

A sliding window: no burst at a window's edge, and memory per client that does not grow with its quota. In process no
window holds more than the quota; in Redis, two counters estimate it (the `limits` library).
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from limits import RateLimitItem, parse_many
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from app.errors import QuotaExceeded
from app.settings import Settings
from serving.errors import RequestError
from serving.online.redis_link import RedisDown, RedisLink, connect

GUESSES = "100/minute"
MAX_REMEMBERED = 10_000  # clients over their quota; beyond that, all are forgotten and counted again
MAX_COUNTED = 100_000  # clients counted in process; beyond that, likewise
SHARED_CLOCK_S = 0.001  # Redis counts time in milliseconds
SLICES = 32  # of a window; what was counted in one of them leaves the window together


class Quotas:
    """A Redis that is down, slow or full costs at most its time limit; counts in process take over."""

    def __init__(self, settings: Settings) -> None:
        self._over: dict[str, tuple[float, str]] = {}  # client -> until when, and the message
        self._limits = parse_many(settings.quota) if settings.quota else []
        self._work = parse_many(settings.work_quota) if settings.work_quota else []
        self._guesses = parse_many(settings.quota or GUESSES)
        self._secret = settings.user_secret
        self._here = LocalCounts()
        self._redis = None
        if (self._limits or self._work) and settings.redis_url is not None:
            self._redis = connect(settings.redis_url.get_secret_value())
            self._link = RedisLink(self._redis, settings.redis_timeout_ms / 1000)
            self._shared = RedisStorage(
                "async+redis://",  # only names the kind: the connections are the pool's
                implementation="redispy",
                key_prefix=f"{settings.redis_prefix}:quota",
                connection_pool=self._redis.connection_pool,  # type: ignore[arg-type]
            )

    @property
    def largest(self) -> float:
        """The most that one call may ever count, however long its client waits."""
        return min((limit.amount for limit in self._limits), default=float("inf"))

    async def take(self, client: str, cost: int = 1) -> None:
        """Counts `cost` requests of a client. Raises QuotaExceeded when that exceeds its quota."""
        await self._take(self._limits, client, cost)

    async def take_work(self, client: str, work: int) -> None:
        """Counts the work of one search, which is known once its request is read. Raises QuotaExceeded, or RequestError
        where no waiting would help."""
        most = min((limit.amount for limit in self._work), default=work)
        if work > most:
            raise RequestError(
                f"This client may ask for {most} rows x (steps + 1) at most; ask for less.", "beam_width"
            )
        await self._take(self._work, f"work of {client}", work)

    async def take_guess(self, address: str) -> None:
        """Counts a wrong key against the address that sent it: against the quota, or GUESSES where there is none.
        Raises QuotaExceeded. Keys that are right are counted apart, whatever their neighbours behind a proxy try."""
        await self._take(self._guesses, f"guesses of {address}", 1)

    async def _take(self, limits: Sequence[RateLimitItem], client: str, cost: int) -> None:
        if not limits or cost < 1:
            return
        # Hashed, so that neither a key's digest nor an address can be read in Redis.
        name = hashlib.blake2b(client.encode(), key=self._secret, digest_size=16).hexdigest()
        for limit in limits:
            wait = await self._wait(limit, name, cost)
            if wait is not None:
                message = f"The quota is {limit}; send fewer requests, or wait."
                if cost == 1:
                    self._remember(client, time.monotonic() + wait, message)
                raise QuotaExceeded(message, wait)

    def refusal(self, client: str) -> QuotaExceeded | None:
        """What `take` would raise for one request, if that is known without counting: a client that was refused stays
        refused until its time has come."""
        until, message = self._over.get(client, (0.0, ""))
        left = until - time.monotonic()
        return QuotaExceeded(message, left) if left > 0 else None

    def _remember(self, client: str, until: float, message: str) -> None:
        if len(self._over) >= MAX_REMEMBERED:
            self._over.clear()
        self._over[client] = until, message

    async def _wait(self, limit: RateLimitItem, name: str, cost: int) -> float | None:
        """Seconds to wait; or None if the quota permitted the cost, which is then counted."""
        if self._redis is not None:
            try:
                return await self._link.call(lambda client: _hit(self._shared, limit, name, cost))
            except (RedisDown, RedisError):
                pass  # counted here until Redis is back
        return self._here.hit(limit, name, cost)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()


class LocalCounts:
    """Counts in process, by a clock that nobody sets: the storage in memory of `limits` goes by the wall clock, and a
    client over its quota would stay so for as long as that clock was set back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[tuple[RateLimitItem, str], deque[tuple[float, int]]] = {}  # when, and how many until then

    def hit(self, limit: RateLimitItem, name: str, cost: int) -> float | None:
        """Seconds until `cost` fits under the limit; or None if it fits, and is counted."""
        now, period = self._clock(), limit.get_expiry()
        if len(self._counts) >= MAX_COUNTED:
            self._counts.clear()
        counts = self._counts.setdefault((limit, name), deque())
        while counts and counts[0][0] <= now - period:
            counts.popleft()
        excess = sum(count for _, count in counts) + cost - limit.amount
        if excess > 0:
            for at, count in counts:
                excess -= count
                if excess <= 0:
                    return period - (now - at)
            return float(period)
        slice_ = period / SLICES
        if counts and counts[-1][0] // slice_ == now // slice_:
            cost += counts.pop()[1]
        counts.append((now, cost))
        return None


async def _hit(storage: RedisStorage, limit: RateLimitItem, name: str, cost: int) -> float | None:
    """As `LocalCounts.hit`, in Redis."""
    if await SlidingWindowCounterRateLimiter(storage).hit(limit, name, cost=cost):
        return None
    return _wait_in_redis(limit, cost, *await storage.get_sliding_window(limit.key_for(name), limit.get_expiry()))


def _wait_in_redis(
    limit: RateLimitItem, cost: int, before: int, before_lasts: float, current: int, current_lasts: float
) -> float:
    """Seconds until `cost` fits under the limit, if nothing else is counted. What `limits` calls the time of the reset
    is when the estimate next changes at all, which may be long before.

    The estimate is floor(before * before_lasts / period) + current; a window is current for one period, and then the
    one before for another. `*_lasts`: seconds until the end of that.
    """
    period, room = limit.get_expiry(), limit.amount - cost
    if current <= room:  # once enough of the window before has passed
        wait = before_lasts - (room - current + 1) * period / max(1, before)
    else:  # once the current window is the one before, and enough of it has passed
        wait = current_lasts - (room + 1) * period / current
    return max(0.0, wait) + SHARED_CLOCK_S
