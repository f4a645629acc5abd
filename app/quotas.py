"""How often one client may ask: counted in Redis where there is one, so that replicas share the count, else in process.

A sliding window of two counters (the `limits` library): constant memory a client, no burst at a window's edge.
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

REMEMBERED = 10_000  # clients that are over their quota; beyond them all are counted anew


class Quotas:
    """A Redis that is gone, slow or full costs at most its time limit; the count in process stands in for it."""

    def __init__(self, settings: Settings) -> None:
        self._over: dict[str, tuple[float, str]] = {}  # client -> until when, and what it is told
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
        """Counts `cost` requests of a client. Raises QuotaExceeded when that is more than it may ask for."""
        if not self._limits or cost < 1:
            return
        # Neither a key's digest nor an address is readable in Redis.
        name = hashlib.blake2b(client.encode(), key=self._secret, digest_size=16).hexdigest()
        for limit in self._limits:
            wait = await self._wait(limit, name, cost)
            if wait is not None:
                message = f"The quota is {limit}; send fewer requests, or wait."
                if cost == 1:
                    self._remember(client, time.monotonic() + wait, message)
                raise QuotaExceeded(message, wait)

    def refusal(self, client: str) -> QuotaExceeded | None:
        """What `take` would raise for one request, where that is known without counting: a client that was refused has
        no room before its time has come."""
        until, message = self._over.get(client, (0.0, ""))
        left = until - time.monotonic()
        return QuotaExceeded(message, left) if left > 0 else None

    def _remember(self, client: str, until: float, message: str) -> None:
        if len(self._over) >= REMEMBERED:
            self._over.clear()
        self._over[client] = until, message

    async def _wait(self, limit: RateLimitItem, name: str, cost: int) -> float | None:
        """Seconds to wait, or None when there was room and the cost is counted."""
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
