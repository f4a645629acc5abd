"""Where encoder states are kept: in this process, bounded in bytes, and in Redis, shared by all processes.

A state is used only for the model version and the history it was made from; anything else that is found is a miss.
Redis holds strings, at most SLOTS per user: versions served at the same time rarely share one, each has its own time to
live, and a user can be erased without a list of versions. A value:

    magic 4, of the dtype | history's digest 16 | S u32 | D u32 | checksum 16 | S * D numbers, little-endian

The checksum is keyed by the service's secret: whoever can write to Redis, but does not know it, cannot make a state.
Without a secret it finds damage only. Commands name one key each, so that a Redis in cluster mode takes them.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Literal

import numpy as np
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from serving.online.redis_link import RedisDown, RedisLink
from serving.types import REDIS_PREFIX, EncoderState, StateDtype

MAGIC: dict[StateDtype, bytes] = {"float32": b"SRE3", "float16": b"SRE4"}
NUMBER: dict[StateDtype, str] = {"float32": "<f4", "float16": "<f2"}
HEADER = struct.Struct("<4s16sII16s")
COVERED = HEADER.size - 16  # bytes of the header that the checksum covers, as it does the numbers
SLOTS = 8
HEARTBEAT = 5.0  # seconds of silence before the channel is pinged, and again before it counts as broken


def history_digest(version: str, history: Sequence[int]) -> bytes:
    """16 bytes that identify a history (catalogue rows) under a model version."""
    return blake2b(np.asarray(history, dtype="<i8").tobytes(), digest_size=16, person=_person(version)).digest()


def _person(version: str) -> bytes:
    return blake2b(version.encode(), digest_size=16).digest()


def pack(state: EncoderState, history: bytes, secret: bytes = b"") -> bytes:
    """The state as a value for Redis. `history`: its digest. `secret`: at most 64 bytes."""
    rows, width = state.hidden.shape
    kind: StateDtype = "float16" if state.hidden.dtype == np.float16 else "float32"
    body = np.ascontiguousarray(state.hidden, dtype=NUMBER[kind]).tobytes()
    header = HEADER.pack(MAGIC[kind], history, rows, width, b"")[:COVERED]
    return header + _checksum(header, body, secret) + body


def unpack(
    value: object, history: bytes, dtype: StateDtype = "float32", secret: bytes = b""
) -> EncoderState | Literal["stale", "invalid"]:
    """The state, or why the value is not it: from another history or of another dtype (stale), or garbage or made
    without the secret (invalid)."""
    if not isinstance(value, bytes) or len(value) < HEADER.size:
        return "invalid"
    magic, made_from, rows, width, checksum = HEADER.unpack_from(value)
    body = value[HEADER.size :]
    kind = next((kind for kind, known in MAGIC.items() if known == magic), None)
    if kind is None or not rows or not width or len(body) != np.dtype(NUMBER[kind]).itemsize * rows * width:
        return "invalid"
    if not compare_digest(checksum, _checksum(value[:COVERED], body, secret)):
        return "invalid"
    if made_from != history or kind != dtype:
        return "stale"
    return EncoderState(np.frombuffer(body, dtype=NUMBER[kind]).reshape(rows, width))


def _checksum(header: bytes, body: bytes, secret: bytes) -> bytes:
    covered = blake2b(header, digest_size=16, key=secret, person=b"encoder state")
    covered.update(body)
    return covered.digest()


class MemoryTier:
    """States of the most recent users, in this process: at most `max_users` and `max_bytes`, each for `ttl` seconds."""

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

    def clear(self) -> None:
        self._states.clear()
        self.nbytes = 0


class RedisTier:
    """States shared by processes. `read_link` is used while a request waits, and whatever goes wrong on it is a miss;
    `write_link` has a longer limit, for writing after the answer and for erasing. No value above `max_value_bytes` is
    sent or fetched, and none of another dtype than this process makes, or made without its secret, is used."""

    def __init__(
        self,
        read_link: RedisLink,
        write_link: RedisLink,
        ttl: int,
        max_value_bytes: int,
        dtype: StateDtype = "float32",
        *,
        prefix: str = REDIS_PREFIX,
        secret: bytes = b"",
    ) -> None:
        self._read_link, self._write_link, self._ttl = read_link, write_link, ttl
        self._max_value_bytes, self._dtype, self._secret = max_value_bytes, dtype, secret
        self._prefix, self.channel = prefix, f"{prefix}:erased"

    def _keys(self, user: str) -> list[str]:
        return [f"{self._prefix}:states:{user}:{slot}" for slot in range(SLOTS)]

    def _key(self, user: str, version: str) -> str:
        return self._keys(user)[_person(version)[0] % SLOTS]

    async def get(
        self, user: str, version: str, history: bytes
    ) -> EncoderState | Literal["miss", "stale", "invalid", "error"]:
        key = self._key(user, version)
        try:
            value = await self._read_link.execute_pipelined(
                "GETRANGE", key, 0, self._max_value_bytes
            )  # a foreign value may be huge
        except RedisDown:
            return "error"
        except RedisError:  # not a string: a foreign value under our key
            return "invalid"
        return unpack(value, history, self._dtype, self._secret) if value else "miss"

    async def put(
        self, user: str, version: str, history: bytes, state: EncoderState
    ) -> Literal["stored", "too_large", "error"]:
        value = pack(state, history, self._secret)
        if len(value) > self._max_value_bytes:
            return "too_large"
        try:
            await self._write_link.execute_pipelined("SET", self._key(user, version), value, "EX", self._ttl)
        except (RedisDown, RedisError):  # gone, or full
            return "error"
        return "stored"

    async def erase(self, user: str, *, announce: bool) -> None:
        """Erases the user's states and announces it. Raises RedisDown or RedisError if that is not confirmed."""

        async def unlink(client: Redis) -> None:
            async with client.pipeline(transaction=False) as pipe:  # a full Redis takes no transaction
                for key in self._keys(user):
                    pipe.unlink(key)
                if announce:
                    pipe.publish(self.channel, user)
                await pipe.execute()

        await self._write_link.call(unlink)

    async def holds(self, user: str) -> bool:
        found = await asyncio.gather(*(self._write_link.execute_pipelined("EXISTS", key) for key in self._keys(user)))
        return any(found)

    async def erased(self) -> AsyncIterator[str | None]:
        """Users as any process erases them; None whenever some may have been missed, as at the start.

        Raises RedisError or OSError at most 2 * HEARTBEAT seconds after the channel broke.
        """
        async with self._write_link.client.pubsub() as channel:
            await channel.subscribe(self.channel)
            silent = False
            while True:
                message = await channel.get_message(timeout=HEARTBEAT)
                if message is None:
                    if silent:
                        raise RedisConnectionError("The channel of erasures does not answer.")
                    await channel.ping()
                elif message["type"] == "subscribe":
                    yield None
                elif message["type"] == "message":
                    yield message["data"].decode(errors="replace")
                silent = message is None
