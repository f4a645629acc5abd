"""Quotas per client: counted in Redis if there is one, so that replicas share the count, else in process.

A sliding window of two counters (the `limits` library): constant memory per client, no burst at a window's edge.
"""

from __future__ import annotations

import hashlib
import time

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from app.errors import QuotaExceeded
from app.settings import Settings
from serving.online.redis_link import RedisDown, RedisLink, connect

MAX_REMEMBERED = 10_000  # clients over their quota; beyond that, all are forgotten and counted again


class Quotas:
    """A Redis that is down, slow or full costs at most its time limit; counts in process take over."""

    def __init__(self, settings: Settings) -> None:
        self._over: dict[str, tuple[float, str]] = {}  # client -> until when, and the message
        self._limits = parse_many(settings.quota) if settings.quota else []
        self._secret = settings.user_secret
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._redis = None
        if self._limits and settings.redis_url is not None:
            url = settings.redis_url.get_secret_value()
            self._redis = connect(url)
            self._link = RedisLink(self._redis, settings.redis_timeout_ms / 1000)
            self._shared = SlidingWindowCounterRateLimiter(
                RedisStorage(
                    f"async+{url}",
                    implementation="redispy",
                    key_prefix="streamrec:quota",
                    connection_pool=self._redis.connection_pool,  # type: ignore[arg-type]
                )
            )

    async def take(self, client: str, cost: int = 1) -> None:
        """Counts `cost` requests of a client. Raises QuotaExceeded when that exceeds its quota."""
        if not self._limits or cost < 1:
            return
        # Hashed, so that neither a key's digest nor an address can be read in Redis.
        name = hashlib.blake2b(client.encode(), key=self._secret, digest_size=16).hexdigest()
        for limit in self._limits:
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
        return await _hit(self._here, limit, name, cost)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()


async def _hit(limiter: SlidingWindowCounterRateLimiter, limit: RateLimitItem, name: str, cost: int) -> float | None:
    if await limiter.hit(limit, name, cost=cost):
        return None
    return max(0.0, (await limiter.get_window_stats(limit, name)).reset_time - time.time())
