"""A link to Redis that counts what it sends: what the breaker holds back is not sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis

from serving.online.redis_link import RedisLink

T = TypeVar("T")
FAILURES, PAUSE = 3, 2.0  # the link's defaults: so many failures in a row, then so many seconds without a call


class Clock:
    """A breaker's clock that moves by what a test adds, and by next to nothing whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class CountedLink(RedisLink):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent = 0

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        async def counted(client: Redis) -> T:
            self.sent += 1
            return await command(client)

        return await super().call(counted)
