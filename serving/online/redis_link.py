"""A Redis that may be slow, dead or full: each call costs at most its time limit, and failures in a row pause it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

T = TypeVar("T")
Word = str | bytes | int

TOGETHER = 16  # commands in one round trip: values of tens of KB of many more would outlast a limit of milliseconds


class RedisDown(Exception):
    """Redis did not answer in time, refused, or is being left alone after failures in a row."""


def connect(url: str, *, max_connections: int = 16) -> Redis:
    """A client that never retries by itself, and whose calls wait for a free connection. Connects on first use.

    What a burst has opened stays open, so `max_connections` is also what a process holds in the long run.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        timeout=1.0,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        max_connections=max_connections,
    )
    return Redis.from_pool(pool)


class RedisLink:
    """Calls with a time limit (seconds) and a breaker: after `failures` in a row nothing is sent for `pause` seconds.

    The limit is kept outside the client, which goes on by itself to its own, longer one. So a connection that takes
    long to open is there for the next call instead of being given up half-way, and an event loop that is late is not
    taken for a slow Redis: whatever has arrived by then counts.
    """

    def __init__(
        self,
        client: Redis,
        limit: float,
        *,
        failures: int = 3,
        pause: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client, self.limit = client, limit
        self._failures, self._pause, self._clock = failures, pause, clock
        self._failed, self._closed_until, self._heard = 0, 0.0, float("-inf")
        self._asked: list[tuple[Word, ...]] = []
        self._replies: asyncio.Future[list[Any]]

    async def ask(self, *command: Word) -> Any:
        """The reply to one command, as Redis sends it. Raises RedisDown and ResponseError.

        Commands asked for in the same turn of the event loop share a round trip, a connection and the time limit.
        """
        if not self._asked or len(self._asked) == TOGETHER:
            self._asked = []
            self._replies = asyncio.ensure_future(self._send(self._asked))
            self._replies.add_done_callback(_forget)
        place, replies = len(self._asked), self._replies
        self._asked.append(command)
        reply = (await asyncio.shield(replies))[place]  # shielded: whoever gives up leaves the others theirs
        if isinstance(reply, RedisError):
            raise reply
        return reply

    async def _send(self, commands: list[tuple[Word, ...]]) -> list[Any]:
        if self._asked is commands:
            self._asked = []

        async def travel(client: Redis) -> list[Any]:
            async with client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, RedisError) and not _is_reply(reply):
                    raise reply
            return replies

        return await self.call(travel)

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """The command's reply. Raises RedisDown; replies that are errors (ResponseError) pass through."""
        now = self._clock()
        if now < self._closed_until:
            raise RedisDown("paused after failures")
        if self._failed >= self._failures:
            self._closed_until = now + self._pause  # this one call tries; the others stay away until it is back
        task = asyncio.ensure_future(command(self.client))
        task.add_done_callback(_forget)  # nobody waits any longer once the limit is over or the caller is cancelled
        done, _ = await asyncio.wait({task}, timeout=self.limit)
        if not done:
            if self._heard < now:  # else it is there, and only this was too much for the time
                self._fail()
            raise RedisDown("no answer in time")
        try:
            reply = task.result()
        except (TimeoutError, RedisError, OSError) as error:
            if _is_reply(error):
                self._answered()
                raise
            self._fail()
            raise RedisDown(type(error).__name__) from error
        self._answered()
        return reply

    def _answered(self) -> None:
        self._failed, self._closed_until, self._heard = 0, 0.0, self._clock()

    def _fail(self) -> None:
        self._failed += 1
        if self._failed >= self._failures:
            self._closed_until = self._clock() + self._pause


def _is_reply(error: BaseException) -> bool:
    """Whether Redis itself said no (wrong type, out of memory), as opposed to not answering."""
    return isinstance(error, ResponseError) and not isinstance(error, (BusyLoadingError, RedisConnectionError))


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # marks it as seen: whoever waits is told, whoever has left does not care
