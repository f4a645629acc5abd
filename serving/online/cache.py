"""Encoder states per user, so that a history is encoded only once: kept in this process, then in Redis, and shared by
concurrent requests.

Erasing a user reaches every process: the one that gets the request erases Redis and tells the others, which forget the
user and erase again what they may have been writing. Where Redis cannot be reached, an erasure is refused rather than
silently half done. A process cut off from Redis learns late: once reconnected it forgets every state it holds, since it
cannot know whom it missed. Until then a state serves only the exact history it was made from, and expires as usual.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from serving.online.tiers import MemoryTier, RedisTier, history_digest
from serving.types import EncoderState, StateFrom

log = logging.getLogger("streamrec.cache")

Count = Callable[[str, str], None]  # (tier, result) -> counted
LOOKUPS = ("hit", "miss", "stale", "invalid")  # results in either tier
ACCESSES = [  # all (tier, result) that are counted
    *(("memory", result) for result in (*LOOKUPS, "cleared")),
    *(("redis", result) for result in (*LOOKUPS, "error", "stored", "too_large", "write_error")),
]

MAX_PENDING_WRITES = 256
RECONNECT = 1.0  # seconds


@dataclass(eq=False, slots=True, weakref_slot=True)
class Flight:
    """A state that was found or is yet to be made. Concurrent requests of one user and history share it, so that it is
    computed once for all of them."""

    state: EncoderState | None = None
    kept: bool = False


@dataclass(slots=True)
class Lookup:
    """What was found, and what `put` needs to store a state that was not."""

    source: StateFrom
    flight: Flight = field(default_factory=Flight)
    user: str = ""
    version: str = ""
    history: bytes = b""
    erasures: int = 0


class StateCache:
    """Both tiers as one. `user` is a digest, never a raw id. `count(tier, result)` is called for every access."""

    def __init__(
        self, memory: MemoryTier | None, redis: RedisTier | None, count: Count = lambda tier, result: None
    ) -> None:
        self._memory, self._redis, self._count = memory, redis, count
        self._flights: WeakValueDictionary[tuple[str, bytes], Flight] = WeakValueDictionary()
        self._writes: dict[str, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None
        self.erasures = 0  # that this process knows of

    async def start(self) -> None:
        """Starts following the erasures of other processes."""
        if self._redis is not None:
            self._following = asyncio.ensure_future(self._follow(self._redis))

    async def close(self) -> None:
        """Finishes pending writes and stops following."""
        if self._following is not None:
            self._following.cancel()
        await asyncio.gather(self.flush(), *filter(None, [self._following]), return_exceptions=True)

    @property
    def pending_writes(self) -> int:
        """How many states are on their way to Redis."""
        return len(self._writes)

    async def flush(self) -> None:
        """Returns once the pending writes are done."""
        await asyncio.gather(*self._writes.values())

    async def get(
        self,
        user: str,
        version: str,
        history: Sequence[int],
        erasures: int | None = None,
        fits: Callable[[EncoderState], bool] = lambda state: True,
    ) -> Lookup:
        """The state of this history under this model version, from the nearest tier that has it.

        version: of all that decides what the state is: the model, and what runs it. erasures: the count when the
        request began to read what is known about the user; default: the present one. fits: whether the model could
        have made a state; one that it could not is a miss, and would spoil the batch it gets into.
        """
        if self._memory is None and self._redis is None:
            return Lookup("off")
        digest = history_digest(version, history)
        erasures = self.erasures if erasures is None else erasures

        def lookup(source: StateFrom, flight: Flight) -> Lookup:
            return Lookup(source, flight, user, version, digest, erasures)

        if self._memory is not None:
            found: EncoderState | str = self._memory.get(user, digest)
            if not isinstance(found, str) and not fits(found):
                found = "invalid"
            self._count("memory", found if isinstance(found, str) else "hit")
            if not isinstance(found, str):
                return lookup("memory", Flight(found))
        if self._redis is not None:
            answer: EncoderState | str = await self._redis.get(user, version, digest)
            if not isinstance(answer, str) and not fits(answer):
                answer = "invalid"
            self._count("redis", answer if isinstance(answer, str) else "hit")
            if not isinstance(answer, str):
                if self._memory is not None and erasures == self.erasures:
                    self._memory.put(user, digest, answer)
                return lookup("redis", Flight(answer))
        return lookup("miss", self._flights.setdefault((user, digest), Flight()))

    def put(self, lookup: Lookup) -> None:
        """Stores the state that `lookup` missed and its flight has now. Returns at once; Redis is written later."""
        flight, state = lookup.flight, lookup.flight.state
        # Someone was erased meanwhile, perhaps this user: storing the state could bring their data back.
        if lookup.source != "miss" or state is None or flight.kept or lookup.erasures != self.erasures:
            return
        flight.kept = True
        if self._memory is not None:
            self._memory.put(lookup.user, lookup.history, state)
        if self._redis is not None and lookup.user not in self._writes and len(self._writes) < MAX_PENDING_WRITES:
            task = asyncio.ensure_future(self._write(self._redis, lookup, state))
            self._writes[lookup.user] = task
            task.add_done_callback(lambda _: self._writes.pop(lookup.user, None))

    async def _write(self, redis: RedisTier, lookup: Lookup, state: EncoderState) -> None:
        result = await redis.put(lookup.user, lookup.version, lookup.history, state)
        self._count("redis", "write_error" if result == "error" else result)

    async def erase(self, user: str) -> None:
        """Erases the user's states everywhere. Raises RedisDown or RedisError when Redis could not be reached."""
        await self._forget(user)
        if self._redis is not None:
            await self._redis.erase(user, announce=True)

    async def held(self, user: str) -> list[str]:
        """The tiers that hold a state of the user. Raises RedisDown or RedisError."""
        tiers = ["memory"] if self._memory is not None and user in self._memory else []
        return [*tiers, "redis"] if self._redis is not None and await self._redis.holds(user) else tiers

    async def _forget(self, user: str) -> None:
        """Removes the user from this process, and waits for a write in progress, so that it can be erased next."""
        self.erasures += 1
        self._flights.clear()
        if self._memory is not None:
            self._memory.erase(user)
        if user in self._writes:
            await asyncio.wait({self._writes[user]})

    async def _follow(self, redis: RedisTier) -> None:
        listening = True
        while True:
            try:
                async for user in redis.erased():
                    listening = True
                    if user is None:
                        self._forget_all()
                    else:
                        await self._forget(user)
                        await redis.erase(user, announce=False)  # this process may have written after the erasure
            except Exception as error:  # whatever is missed meanwhile, reconnecting makes up for it
                if listening:
                    log.warning("cannot follow erasures by other processes until Redis is back: %s", error)
                listening = False
                await asyncio.sleep(RECONNECT)

    def _forget_all(self) -> None:
        self.erasures += 1
        self._flights.clear()
        if self._memory is not None and len(self._memory):
            self._memory.clear()
            self._count("memory", "cleared")
