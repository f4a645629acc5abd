"""Known histories of users: appended, read, erased; in this process or in Redis.

Item ids are kept as strings: they outlive model versions, catalogue rows do not. An append returns only once the
events are stored.
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
    """The store of user histories did not confirm in time, or refused. The change may still take effect."""


class UserStore(Protocol):
    """Histories by user, oldest first, trimmed to the newest events."""

    async def append(self, user: str, items: Sequence[str]) -> int:
        """Appends the items to those already kept. Returns how many are kept now. Raises StoreUnavailable."""

    async def get(self, user: str) -> list[str]:
        """The user's items, [] for an unknown user. Raises StoreUnavailable."""

    async def delete(self, user: str) -> bool:
        """Erases the user's items. Returns whether there were any. Raises StoreUnavailable."""


def digest(user_id: str, secret: bytes = b"") -> str:
    """Replaces a user id in keys: 128 bits, keyed by `secret` (at most 64 bytes) so that ids cannot be guessed."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=16, key=secret).hexdigest()


class MemoryUsers:
    """Histories in this process, lost when it ends. At most `max_users`; the least recently used goes first."""

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
    """Keeps nothing about anybody: for processes that share no store."""

    async def append(self, user: str, items: Sequence[str]) -> int:
        raise StoreUnavailable(
            "This service keeps no histories, because its workers share no Redis; set STREAMREC_REDIS_URL."
        )

    async def get(self, user: str) -> list[str]:
        return []

    async def delete(self, user: str) -> bool:
        return False


class RedisUsers:
    """Histories in Redis, one list per user, shared by all replicas."""

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
        raw = await self._reach(self._link.execute_pipelined("LRANGE", self._key(user), -self._max_items, -1))
        return [item.decode("utf-8", "replace") for item in raw]

    async def delete(self, user: str) -> bool:
        return bool(await self._reach(self._link.execute_pipelined("UNLINK", self._key(user))))

    @staticmethod
    async def _reach(work: Awaitable[Any]) -> Any:
        try:
            return await work
        except RedisDown as error:
            raise StoreUnavailable("The store of user histories did not answer; try again shortly.") from error
        except RedisError as error:  # full, or a value of another type under the user's key
            raise StoreUnavailable("The store refused the request; make room in Redis, or erase this user.") from error
