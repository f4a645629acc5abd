"""Known histories of users: appended, read, erased; in this process or in Redis.

A history is item ids and events (`serving.types.Event`), kept as they came: they outlive model versions, catalogue rows
do not. An append returns only once the events are stored; where one user's bounds leave no room for them it is refused,
and the user's older items make room.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from hashlib import blake2b
from typing import Any, Protocol

from redis.exceptions import MovedError, RedisError

from serving.errors import RequestError, StoreUnavailable
from serving.items.events import to_event
from serving.online.redis_link import ONE_NODE, RedisDown, RedisLink
from serving.types import MAX_ID_LENGTH, REDIS_PREFIX, Event

EVENT = b"\xff"  # before the JSON of an event in Redis: no id begins with it, for it is not UTF-8

# Appends, and keeps the newest items within the bounds: KEYS user; ARGV items, bytes, seconds to live, then the items.
APPEND = """
redis.call('RPUSH', KEYS[1], unpack(ARGV, 4))
redis.call('LTRIM', KEYS[1], -ARGV[1], -1)
local items, room, kept = redis.call('LRANGE', KEYS[1], 0, -1), tonumber(ARGV[2]), 0
for i = #items, 1, -1 do
  room = room - #items[i]
  if room < 0 then break end
  kept = kept + 1
end
redis.call('LTRIM', KEYS[1], -kept, -1)
redis.call('EXPIRE', KEYS[1], ARGV[3])
return kept
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is kept of one user: the newest `items`, of at most `nbytes` in UTF-8, for `ttl` seconds after the last."""

    items: int
    nbytes: int
    ttl: int

    def newest(self, history: list[str | Event]) -> list[str | Event]:
        """The end of a history that is within the bounds."""
        room = self.nbytes
        for count, item in enumerate(reversed(history[-self.items :])):
            room -= _nbytes(item)
            if room < 0:
                return history[len(history) - count :]
        return history[-self.items :]

    def check(self, items: Sequence[str | Event]) -> None:
        """Raises RequestError if so many new items would not all be kept for want of bytes."""
        if sum(_nbytes(item) for item in items[-self.items :]) > self.nbytes:
            raise RequestError(
                f"At most {self.nbytes} bytes are kept of a user; send fewer items, the newest.", "items"
            )


def _nbytes(item: str | Event) -> int:
    return len(_packed(item))


def _packed(item: str | Event) -> bytes:
    """An entry of a history as it is kept in Redis."""
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    known = {name: value for name, value in asdict(item).items() if value is not None}
    return EVENT + json.dumps(known, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _unpacked(raw: bytes) -> str | Event | None:
    """The entry, or None for what this service cannot have written."""
    try:
        if raw.startswith(EVENT):
            return to_event(json.loads(raw[1:]))
        item = raw.decode()
    except (ValueError, AttributeError, RecursionError):  # not UTF-8, not JSON, no object, no event
        return None
    return item if len(item) <= MAX_ID_LENGTH else None


def _memory(item: str | Event) -> int:
    """Bytes that Python needs for an entry of a history."""
    return sys.getsizeof(item) + (0 if isinstance(item, str) else sum(map(sys.getsizeof, astuple(item))))


class UserStore(Protocol):
    """Histories by user, oldest first, trimmed to the newest events."""

    async def append(self, user: str, items: Sequence[str | Event]) -> int:
        """Appends the items to those already kept. Returns how many are kept now. Raises StoreUnavailable, and
        RequestError if they alone are more than is kept of a user."""

    async def get(self, user: str) -> list[str | Event]:
        """The user's items, [] for an unknown user. Raises StoreUnavailable."""

    async def delete(self, user: str) -> bool:
        """Erases the user's items. Returns whether there were any. Raises StoreUnavailable."""


def digest(user_id: str, secret: bytes = b"") -> str:
    """Replaces a user id in keys: 128 bits, keyed by `secret` (at most 64 bytes) so that ids cannot be guessed."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=16, key=secret).hexdigest()


@dataclass(frozen=True, slots=True)
class _Known:
    items: list[str | Event]
    nbytes: int  # that Python needs for them
    until: float


class MemoryUsers:
    """Histories in this process, lost when it ends. At most `max_users` and `max_bytes`; the user whose last event is
    oldest goes first."""

    def __init__(
        self, max_users: int, max_bytes: int, bounds: Bounds, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_users, self._max_bytes, self._bounds, self._clock = max_users, max_bytes, bounds, clock
        self._known: OrderedDict[str, _Known] = OrderedDict()  # by last event
        self.nbytes = 0

    async def append(self, user: str, items: Sequence[str | Event]) -> int:
        self._bounds.check(items)
        history = self._bounds.newest([*await self.get(user), *items])
        nbytes = sys.getsizeof(user) + sys.getsizeof(history) + sum(map(_memory, history))
        if nbytes > self._max_bytes:
            raise StoreUnavailable("There is no room for this history; raise STREAMREC_MAX_KNOWN_BYTES, or use Redis.")
        self._forget(user)
        self._known[user] = _Known(history, nbytes, self._clock() + self._bounds.ttl)
        self.nbytes += nbytes
        while len(self._known) > self._max_users or self.nbytes > self._max_bytes:
            self._forget(next(iter(self._known)))
        return len(history)

    async def get(self, user: str) -> list[str | Event]:
        now = self._clock()
        while self._known and next(iter(self._known.values())).until <= now:
            self._forget(next(iter(self._known)))
        return list(self._known[user].items) if user in self._known else []

    async def delete(self, user: str) -> bool:
        return self._forget(user)

    def _forget(self, user: str) -> bool:
        known = self._known.pop(user, None)
        self.nbytes -= known.nbytes if known else 0
        return known is not None


class NoUsers:
    """Keeps nothing about anybody: for processes that share no store."""

    async def append(self, user: str, items: Sequence[str | Event]) -> int:
        raise StoreUnavailable(
            "This service keeps no histories, because its processes share no Redis; set STREAMREC_REDIS_URL."
        )

    async def get(self, user: str) -> list[str | Event]:
        return []

    async def delete(self, user: str) -> bool:
        return False


class RedisUsers:
    """Histories in Redis, one list per user, shared by all replicas."""

    def __init__(self, link: RedisLink, bounds: Bounds, secret: bytes = b"", prefix: str = REDIS_PREFIX) -> None:
        self._link, self._bounds, self._secret, self._prefix = link, bounds, secret, prefix

    def _key(self, user: str) -> str:
        return f"{self._prefix}:user:{digest(user, self._secret)}"

    async def append(self, user: str, items: Sequence[str | Event]) -> int:
        bounds = self._bounds
        bounds.check(items)
        raw = list(map(_packed, items))
        command = self._link.execute_pipelined(
            "EVAL", APPEND, 1, self._key(user), bounds.items, bounds.nbytes, bounds.ttl, *raw
        )
        return int(await self._reach(command))

    async def get(self, user: str) -> list[str | Event]:
        raw = await self._reach(self._link.execute_pipelined("LRANGE", self._key(user), -self._bounds.items, -1))
        return [item for item in map(_unpacked, raw) if item]

    async def delete(self, user: str) -> bool:
        return bool(await self._reach(self._link.execute_pipelined("UNLINK", self._key(user))))

    @staticmethod
    async def _reach(work: Awaitable[Any]) -> Any:
        try:
            return await work
        except RedisDown as error:
            raise StoreUnavailable("The store of user histories did not answer; try again shortly.") from error
        except MovedError as error:
            raise StoreUnavailable(ONE_NODE) from error
        except RedisError as error:  # full, or a value of another type under the user's key
            raise StoreUnavailable("The store refused the request; make room in Redis, or erase this user.") from error
