"""Known histories of users: appended, read, erased; in this process or in Redis. Item ids are kept as strings.

Ids outlive model versions, catalogue rows do not. An append returns only when the events are stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from serving.errors import ServingError
from serving.online.redis_link import RedisDown, RedisLink


class StoreUnavailable(ServingError):
    """The store of user histories did not confirm in time, or refused. What it was told may still take effect."""


class UserStore(Protocol):
    """Histories by user, oldest first, trimmed to the newest events."""

    async def append(self, user: str, items: Sequence[str]) -> int:
        """Store the items behind those already kept. Returns how many are kept now. Raises StoreUnavailable."""

    async def get(self, user: str) -> list[str]:
        """The user's items, [] for a user nobody knows. Raises StoreUnavailable."""

    async def delete(self, user: str) -> bool:
        """Erase the user's items. Returns whether there were any. Raises StoreUnavailable."""


def digest(user_id: str, secret: bytes = b"") -> str:
    """What stands for a user in keys: 128 bits, keyed by `secret` (at most 64 bytes) so that it cannot be guessed."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=16, key=secret).hexdigest()


class MemoryUsers:
    """Histories in this process, gone with it. At most `max_users`; the one not touched longest goes first."""

    def __init__(self, max_users: int, max_items: int) -> None:
        self._max_users, self._max_items = max_users, max_items
        self._histories: OrderedDict[str, list[str]] = OrderedDict()

    async def append(self, user: str, items: Sequence[str]) -> int:
        history = [*self._histories.get(user, []), *items][-self._max_items :]
        self._histories[user] = history
        self._histories.move_to_end(user)
        while len(self._histories) > self._max_users:
            self._histories.popitem(last=False)
        return len(history)

    async def get(self, user: str) -> list[str]:
        if user not in self._histories:
            return []
        self._histories.move_to_end(user)
        return list(self._histories[user])

    async def delete(self, user: str) -> bool:
        return self._histories.pop(user, None) is not None


class NoUsers:
    """Nothing is kept of anybody: for processes that share no store."""

    async def append(self, user: str, items: Sequence[str]) -> int:
        raise StoreUnavailable("This service keeps no histories: its workers need a Redis for them.")

    async def get(self, user: str) -> list[str]:
        return []

    async def delete(self, user: str) -> bool:
        return False


class RedisUsers:
    """Histories in Redis, one list a user, shared by all replicas."""

    def __init__(self, link: RedisLink, max_items: int, secret: bytes = b"") -> None:
        self._link, self._max_items, self._secret = link, max_items, secret

    def _key(self, user: str) -> str:
        return f"streamrec:user:{digest(user, self._secret)}"

    async def append(self, user: str, items: Sequence[str]) -> int:
        key = self._key(user)

        async def push(client: Redis) -> list[Any]:
            async with client.pipeline(transaction=True) as pipe:
                pipe.rpush(key, *[item.encode() for item in items])
                pipe.ltrim(key, -self._max_items, -1)
                return await pipe.execute()

        return min(int((await self._reach(self._link.call(push)))[0]), self._max_items)

    async def get(self, user: str) -> list[str]:
        raw = await self._reach(self._link.ask("LRANGE", self._key(user), -self._max_items, -1))
        return [item.decode("utf-8", "replace") for item in raw]

    async def delete(self, user: str) -> bool:
        return bool(await self._reach(self._link.ask("UNLINK", self._key(user))))

    @staticmethod
    async def _reach(work: Awaitable[Any]) -> Any:
        try:
            return await work
        except RedisDown as error:
            raise StoreUnavailable("The store of user histories did not answer; try again shortly.") from error
        except RedisError as error:  # full, or something of another type lies under the user's key
            raise StoreUnavailable("The store refused; make room in Redis, or erase this user.") from error
