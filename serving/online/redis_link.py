"""A client for a Redis that may be slow, dead or full: a call costs at most its time limit, and after failures in a
row Redis is left alone for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

T = TypeVar("T")
Word = str | bytes | int

ONE_NODE = "Redis is a cluster of several nodes, which this service cannot use; name a Redis that has one primary."
MAX_CONNECTIONS = 16  # of a process
MAX_PIPELINE = 16  # commands per round trip: more values of tens of KB would not arrive within milliseconds


class RedisDown(Exception):
    """Redis did not answer in time, refused the connection, or is being left alone after failures in a row."""


def connect(url: str) -> Redis:
    """A client that never retries on its own and whose calls wait for a free connection. Connects on first use.

    Connections opened by a burst stay open, so a process ends up holding MAX_CONNECTIONS of them.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        timeout=1.0,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
    )
    return Redis.from_pool(pool)


class RedisLink:
    """Calls with a time limit (seconds) and a circuit breaker: after `failures` in a row nothing is sent for `pause`
    seconds.

    The limit is enforced outside the client, which continues until its own, longer timeout. So a connection that is
    slow to open serves the next call instead of being abandoned half-way, and a late event loop is not mistaken for a
    slow Redis: whatever has arrived by then counts.
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
        self._failed, self._paused_until, self._last_reply = 0, 0.0, float("-inf")
        self._pending: list[tuple[Word, ...]] = []
        self._replies: asyncio.Future[list[Any]]

    async def execute_pipelined(self, *command: Word) -> Any:
        """The reply to one command, as Redis sends it. Raises RedisDown and ResponseError.

        Commands issued in the same turn of the event loop share a round trip, a connection and the time limit.
        """
        if not self._pending or len(self._pending) == MAX_PIPELINE:
            self._pending = []
            self._replies = asyncio.ensure_future(self._send(self._pending))
            self._replies.add_done_callback(_mark_retrieved)
        index, replies = len(self._pending), self._replies
        self._pending.append(command)
        reply = (await asyncio.shield(replies))[index]  # shielded: a caller that gives up must not cancel the others
        if isinstance(reply, RedisError):
            raise reply
        return reply

    async def _send(self, commands: list[tuple[Word, ...]]) -> list[Any]:
        if self._pending is commands:
            self._pending = []

        async def round_trip(client: Redis) -> list[Any]:
            async with client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                # Errors that are no replies, such as that Redis is still loading, are raised all the same.
                return await pipe.execute(raise_on_error=False)

        return await self.call(round_trip)

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """The command's reply. Raises RedisDown; error replies (ResponseError) pass through."""
        now = self._clock()
        if now < self._paused_until:
            raise RedisDown("paused after failures")
        if self._failed >= self._failures:
            self._paused_until = now + self._pause  # this one call probes; the others wait for its outcome
        task = asyncio.ensure_future(command(self.client))
        task.add_done_callback(_mark_retrieved)  # nobody awaits it once the limit has passed or the caller is cancelled
        done, _ = await asyncio.wait({task}, timeout=self.limit)
        if not done:
            if self._last_reply < now:  # otherwise Redis is alive, and only this command took too long
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
        self._failed, self._paused_until, self._last_reply = 0, 0.0, self._clock()

    def _fail(self) -> None:
        self._failed += 1
        if self._failed >= self._failures:
            self._paused_until = self._clock() + self._pause


async def fault_of(client: Redis) -> str | None:
    """What keeps this service from using this Redis, in one sentence: a cluster whose keys are spread over nodes.
    Raises RedisError or OSError if Redis does not answer, or does not permit the question."""
    if not (await client.info("cluster")).get("cluster_enabled"):
        return None
    found = await client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return ONE_NODE if int(found.get("cluster_size", 1)) > 1 else None


async def trouble_of(link: RedisLink) -> str | None:
    """Why Redis is not used, in one sentence that holds nothing of its address; None if it answers."""
    try:
        await link.call(lambda client: client.ping())
    except RedisDown as error:
        if isinstance(error.__cause__, AuthenticationError):
            return "Redis refuses the user or the password; correct STREAMREC_REDIS_URL."
        return "Redis does not answer; it is asked again."
    except ResponseError as error:
        if "DB index" in str(error):
            return "Redis has no database of this number; correct STREAMREC_REDIS_URL."
        return "Redis answers with errors; see its log."
    with suppress(RedisDown, RedisError):  # it may not permit the question
        return await link.call(fault_of)
    return None


def _is_reply(error: BaseException) -> bool:
    """Whether Redis itself answered with an error (wrong type, out of memory), as opposed to not answering."""
    return isinstance(error, ResponseError) and not isinstance(error, (BusyLoadingError, RedisConnectionError))


def _mark_retrieved(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # otherwise asyncio logs it as never retrieved; those who still wait get it anyway
