"""What users were shown lately and did not take, so that it can go down in their lists: in this process or in Redis.

A user is the key that stands for one in feedback (`receipts.user_key`). What was shown is forgotten once it is taken,
and at the latest after the window.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from redis.exceptions import RedisError

from serving.errors import StoreUnavailable
from serving.online.redis_link import RedisDown, RedisLink

PER_USER = 500  # newest items
MAX_ENTRIES = 500_000  # of all users of a process; some 100 MB
LEAST = 1e-9  # what is left of a probability at a rotation of 1: behind all others, in order


def lowered(
    item_ids: Sequence[str], scores: Sequence[float], rotated: Collection[str], rotation: float, *, are_logs: bool
) -> list[float]:
    """The scores by which items are listed: of those rotated, the probability or count is (1 - rotation) times as high.
    are_logs: scores are logarithms."""
    left = max(LEAST, 1 - rotation)

    def one(item_id: str, score: float) -> float:
        if item_id not in rotated:
            return score
        return score + math.log(left) if are_logs else score * left

    return list(map(one, item_ids, scores))


class Impressions(Protocol):
    """Every method raises StoreUnavailable."""

    async def show(self, user: str, item_id: str) -> None:
        """The user was shown the item."""

    async def take(self, user: str, item_id: str) -> None:
        """The user took the item."""

    async def get(self, user: str) -> list[str]:
        """The items that the user was shown lately and did not take, oldest first."""

    async def erase(self, user: str) -> None: ...


class LocalImpressions:
    """In this process, lost when it ends. window: seconds. Who was shown nothing for longest makes room."""

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock = window, clock
        self._shown: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()  # until when, oldest first
        self._entries = 0

    async def show(self, user: str, item_id: str) -> None:
        items = self._shown.setdefault(user, OrderedDict())
        self._shown.move_to_end(user)
        self._entries -= len(items)
        items[item_id] = self._clock() + self._window
        items.move_to_end(item_id)
        if len(items) > PER_USER:
            items.popitem(last=False)
        self._entries += len(items)
        while self._entries > MAX_ENTRIES:
            self._forget(next(iter(self._shown)))

    async def take(self, user: str, item_id: str) -> None:
        items = self._shown.get(user, OrderedDict())
        self._entries -= items.pop(item_id, None) is not None
        if not items:
            self._forget(user)  # nothing counts users without items

    async def get(self, user: str) -> list[str]:
        now = self._clock()
        while self._shown and next(reversed(next(iter(self._shown.values())).values())) <= now:
            self._forget(next(iter(self._shown)))
        return [item_id for item_id, until in self._shown.get(user, {}).items() if until > now]

    async def erase(self, user: str) -> None:
        self._forget(user)

    def _forget(self, user: str) -> None:
        self._entries -= len(self._shown.pop(user, ()))


class RedisImpressions:
    """In Redis, a sorted set per user by the time when an item was shown, for all processes. window: seconds."""

    def __init__(self, link: RedisLink, prefix: str, window: int, clock: Callable[[], float] = time.time) -> None:
        self._link, self._prefix, self._window, self._clock = link, prefix, window, clock

    def _key(self, user: str) -> str:
        return f"{self._prefix}:shown:{user}"

    async def show(self, user: str, item_id: str) -> None:
        key = self._key(user)
        await self._call(
            ("ZADD", key, repr(self._clock()), item_id),
            ("ZREMRANGEBYRANK", key, 0, -1 - PER_USER),
            ("EXPIRE", key, self._window),
        )

    async def take(self, user: str, item_id: str) -> None:
        await self._call(("ZREM", self._key(user), item_id))

    async def get(self, user: str) -> list[str]:
        [found] = await self._call(("ZRANGEBYSCORE", self._key(user), f"({self._clock() - self._window}", "+inf"))
        return [item_id.decode() for item_id in found]

    async def erase(self, user: str) -> None:
        await self._call(("UNLINK", self._key(user)))

    async def _call(self, *commands: tuple[str | int, ...]) -> list[Any]:
        """The replies, of one round trip."""
        try:
            return await asyncio.gather(*(self._link.execute_pipelined(*command) for command in commands))
        except RedisDown as error:
            raise StoreUnavailable("The store of impressions did not answer; try again shortly.") from error
        except RedisError as error:
            raise StoreUnavailable("Redis refused the impressions; make room in it, or erase this user.") from error
