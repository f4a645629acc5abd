"""Encoder states per user, so that a history is encoded once: in this process, then in Redis.

A state is used only if model version and history are the very ones it was made from; whatever else is found is a miss.
Redis holds one hash per user (field: model version), so that erasing a user is one command for all versions. A value:

    magic 4 | history's digest 16 | S u32 | D u32 | checksum 16 | S * D float32, little-endian
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from redis.asyncio import Redis
from redis.exceptions import RedisError

from serving.redis_link import RedisDown, RedisLink
from serving.types import EncoderState

Source = Literal["memory", "redis", "miss", "off"]
Count = Callable[[str, str], None]  # (tier, result) -> counted

MAGIC = b"SRE1"
HEADER = struct.Struct("<4s16sII16s")
MAX_PENDING_WRITES = 256


def history_digest(version: str, history: Sequence[int]) -> bytes:
    """16 bytes that stand for a model version and the catalogue rows it encodes."""
    return blake2b(np.asarray(history, dtype="<i8").tobytes(), digest_size=16, person=_person(version)).digest()


def _person(version: str) -> bytes:
    return blake2b(version.encode(), digest_size=16).digest()


def pack(state: EncoderState, history: bytes) -> bytes:
    """The state as a value for Redis. `history`: its digest."""
    rows, width = state.hidden.shape
    body = np.ascontiguousarray(state.hidden, dtype="<f4").tobytes()
    return HEADER.pack(MAGIC, history, rows, width, _checksum(history, rows, width, body)) + body


def unpack(value: object, history: bytes) -> EncoderState | Literal["stale", "invalid"]:
    """The state, or why the value does not hold it: another history's, or rubbish."""
    if not isinstance(value, bytes) or len(value) < HEADER.size:
        return "invalid"
    magic, made_from, rows, width, checksum = HEADER.unpack_from(value)
    body = value[HEADER.size :]
    if magic != MAGIC or not rows or not width or len(body) != 4 * rows * width:
        return "invalid"
    if checksum != _checksum(made_from, rows, width, body):
        return "invalid"
    if made_from != history:
        return "stale"
    return EncoderState(np.frombuffer(body, dtype="<f4").reshape(rows, width))


def _checksum(history: bytes, rows: int, width: int, body: bytes) -> bytes:
    return blake2b(body, digest_size=16, key=history, salt=struct.pack("<II", rows, width)).digest()


class MemoryTier:
    """The states of the users seen last, at most `max_users` and `max_bytes` of them, each for `ttl` seconds."""

    def __init__(self, max_users: int, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_users, self._max_bytes, self._ttl, self._clock = max_users, max_bytes, ttl, clock
        self._states: OrderedDict[str, tuple[bytes, EncoderState, float]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, user: str) -> bool:
        return user in self._states

    def get(self, user: str, history: bytes) -> EncoderState | Literal["miss", "stale"]:
        entry = self._states.get(user)
        if entry is None:
            return "miss"
        made_from, state, until = entry
        if made_from != history or until < self._clock():
            self.erase(user)
            return "stale"
        self._states.move_to_end(user)
        return state

    def put(self, user: str, history: bytes, state: EncoderState) -> None:
        self.erase(user)
        self._states[user] = (history, state, self._clock() + self._ttl)
        self.nbytes += state.nbytes
        while self._states and (len(self._states) > self._max_users or self.nbytes > self._max_bytes):
            self.erase(next(iter(self._states)))

    def erase(self, user: str) -> None:
        entry = self._states.pop(user, None)
        if entry is not None:
            self.nbytes -= entry[1].nbytes


class RedisTier:
    """States shared by replicas. Reading costs at most the link's limit; what goes wrong is a miss."""

    def __init__(self, link: RedisLink, ttl: int, max_value_bytes: int) -> None:
        self._link, self._ttl, self._max_value_bytes = link, ttl, max_value_bytes

    @staticmethod
    def _key(user: str) -> str:
        return f"streamrec:states:{user}"

    async def get(
        self, user: str, version: str, history: bytes
    ) -> EncoderState | Literal["miss", "stale", "invalid", "error"]:
        try:
            value = await self._link.call(lambda client: client.hget(self._key(user), version))
        except RedisDown:
            return "error"
        except RedisError:  # not a hash: somebody else's value under our key
            return "invalid"
        return "miss" if value is None else unpack(value, history)

    async def put(self, user: str, version: str, history: bytes, state: EncoderState) -> Literal["stored", "error"]:
        value = pack(state, history)
        if len(value) > self._max_value_bytes:
            return "error"
        key = self._key(user)

        async def store(client: Redis) -> None:
            async with client.pipeline(transaction=True) as pipe:
                pipe.hset(key, version, value)
                pipe.expire(key, self._ttl)
                await pipe.execute()

        try:
            await self._link.call(store)
        except RedisDown:
            return "error"
        except RedisError:
            await self._clear(key)
            return "error"
        return "stored"

    async def _clear(self, key: str) -> None:
        """Make room for the next write where something of another type lies."""
        try:
            await self._link.call(lambda client: client.unlink(key))
        except (RedisDown, RedisError):
            pass

    async def erase(self, user: str) -> None:
        """Raises RedisDown or RedisError if the user's states may still be there."""
        await self._link.call(lambda client: client.unlink(self._key(user)))

    async def holds(self, user: str) -> bool:
        return bool(await self._link.call(lambda client: client.exists(self._key(user))))


@dataclass(frozen=True, slots=True)
class Lookup:
    """What was found, and what `put` needs to store what was not."""

    state: EncoderState | None
    source: Source
    user: str = ""
    version: str = ""
    history: bytes = b""
    erasures: int = 0


OFF = Lookup(None, "off")


class StateCache:
    """Both tiers as one. `user` is a digest, never a raw id. `count(tier, result)` is told of every access."""

    def __init__(
        self, memory: MemoryTier | None, redis: RedisTier | None, count: Count = lambda tier, result: None
    ) -> None:
        self._memory, self._redis, self._count = memory, redis, count
        self._writes: dict[str, asyncio.Task[None]] = {}
        self._erasures = 0

    async def get(self, user: str, version: str, history: Sequence[int]) -> Lookup:
        """The state of this history under this model version, from the nearest tier that has it."""
        if self._memory is None and self._redis is None:
            return OFF
        digest = history_digest(version, history)
        erasures = self._erasures
        if self._memory is not None:
            found = self._memory.get(user, digest)
            self._count("memory", found if isinstance(found, str) else "hit")
            if not isinstance(found, str):
                return Lookup(found, "memory", user, version, digest, erasures)
        if self._redis is not None:
            if user in self._writes:  # its own last answer is still on the way there
                await asyncio.wait({self._writes[user]})
            answer = await self._redis.get(user, version, digest)
            self._count("redis", answer if isinstance(answer, str) else "hit")
            if not isinstance(answer, str):
                if self._memory is not None and erasures == self._erasures:
                    self._memory.put(user, digest, answer)
                return Lookup(answer, "redis", user, version, digest, erasures)
        return Lookup(None, "miss", user, version, digest, erasures)

    def put(self, lookup: Lookup, state: EncoderState) -> None:
        """Keep the state that `lookup` missed. Returns at once: writing to Redis goes on behind the answer."""
        # Erased meanwhile (this user or, rarely, another): keeping it would bring a trace back.
        if lookup.source != "miss" or lookup.erasures != self._erasures:
            return
        if self._memory is not None:
            self._memory.put(lookup.user, lookup.history, state)
        if self._redis is not None and lookup.user not in self._writes and len(self._writes) < MAX_PENDING_WRITES:
            task = asyncio.ensure_future(self._write(self._redis, lookup, state))
            self._writes[lookup.user] = task
            task.add_done_callback(lambda _: self._writes.pop(lookup.user, None))

    async def _write(self, redis: RedisTier, lookup: Lookup, state: EncoderState) -> None:
        result = await redis.put(lookup.user, lookup.version, lookup.history, state)
        self._count("redis", "stored" if result == "stored" else "write_error")

    async def erase(self, user: str) -> None:
        """Erase the user's states in both tiers. Raises RedisDown or RedisError where Redis could not be reached."""
        self._erasures += 1
        if self._memory is not None:
            self._memory.erase(user)
        if self._redis is not None:
            if user in self._writes:
                await asyncio.wait({self._writes[user]})
            await self._redis.erase(user)

    async def held(self, user: str) -> list[str]:
        """The tiers that hold something of the user. Raises RedisDown or RedisError."""
        tiers = ["memory"] if self._memory is not None and user in self._memory else []
        return [*tiers, "redis"] if self._redis is not None and await self._redis.holds(user) else tiers
