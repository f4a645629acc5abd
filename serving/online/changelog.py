"""What operators change while the service runs, as an append-only log that every process replays and then follows.

An append returns once its entries are stored, so what was acknowledged survives a kill at any moment. Positions are
opaque and grow; "" is the start. The log is a Redis stream, which all replicas share; a file, for the workers of one
machine; or in the memory of one process, which a restart loses.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from serving.errors import RequestError, StoreError, StoreUnavailable
from serving.files import append_whole
from serving.online.redis_link import RedisDown, RedisLink

log = logging.getLogger("streamrec.changelog")

MAX_ENTRY_BYTES = 64 << 10
STAMP_BYTES = 256  # that kind, id and time take at most
READ_BYTES = 4 << 20  # of a file at once; more than an entry
READ_ENTRIES = 1000  # of a stream at once
LOOK_EVERY = 0.05  # seconds, whether a file has grown
BLOCK = 0.5  # seconds a call to Redis waits; less than a connection's time limit
FIELD = b"entry"
CHANGES_FILE = "changes.jsonl"  # in the folder of the service's state

Entry = Mapping[str, Any]


class Logged(NamedTuple):
    """An entry and the position after it."""

    position: str
    entry: dict[str, Any]


class ChangeLog(Protocol):
    """is_durable: whether a restart keeps what was appended."""

    is_durable: bool

    async def append(self, entries: Sequence[Entry]) -> None:
        """Appends entries; if it raises, all of them or none. Raises RequestError for one that is too large, and
        StoreUnavailable if the store did not confirm: they may have been stored all the same."""

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        """The next entries after a position, oldest first; none if there are none within `wait` seconds.

        Raises StoreUnavailable if the store does not answer, StoreError if what it holds is no log of changes."""


class MemoryLog:
    """In this process, lost when it ends."""

    is_durable = False

    def __init__(self) -> None:
        self._entries: list[bytes] = []
        self._warned = False
        self._grown = asyncio.Event()

    async def append(self, entries: Sequence[Entry]) -> None:
        self._entries += [encoded(entry) for entry in entries]
        self._grown.set()
        if not self._warned:
            self._warned = True
            log.warning("changes are lost at a restart; set STREAMREC_STATE_DIR or STREAMREC_REDIS_URL to keep them")

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        begin = int(after or 0)
        if begin == len(self._entries) and wait:
            self._grown.clear()
            try:
                await asyncio.wait_for(self._grown.wait(), wait)
            except TimeoutError:
                return []
        return [Logged(str(begin + i + 1), json.loads(line)) for i, line in enumerate(self._entries[begin:])]


class NoLog:
    """Takes nothing: for processes that share no store, of which each would hold another catalogue."""

    is_durable = False

    async def append(self, entries: Sequence[Entry]) -> None:
        raise StoreUnavailable(
            "These processes share no log of changes; set STREAMREC_REDIS_URL, or STREAMREC_STATE_DIR on one machine."
        )

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        await asyncio.sleep(wait)
        return []


class FileLog:
    """A file of JSON lines, shared by the processes of one machine. A position is an offset in bytes.

    A lock on the file keeps one process from reading what another has not yet forced to the disk. A last line without
    its end was being written when a process was killed; it was never acknowledged, is not read, and is cut off by the
    next append.
    """

    is_durable = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_to_end = (0, 0)  # size and time of the file, when nothing new was in it

    async def append(self, entries: Sequence[Entry]) -> None:
        lines = b"".join(encoded(entry) + b"\n" for entry in entries)
        try:
            await asyncio.to_thread(self._append, lines)
        except OSError as error:
            raise StoreUnavailable(
                f"The log of changes cannot be written ({error.strerror}); make room on its disk, or give it rights."
            ) from error

    def _append(self, lines: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.exists()
        with self._path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            end = _end_of_last_line(file.fileno())
            file.truncate(end)
            append_whole(file, lines, end)
        if is_new:  # or a power cut could leave the contents with no name
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        try:
            return await self._read_until(int(after or 0), time.monotonic() + wait)
        except OSError as error:
            raise StoreUnavailable(
                f"The log of changes cannot be read ({error.strerror}); it is tried again."
            ) from error

    async def _read_until(self, begin: int, until: float) -> list[Logged]:
        while True:
            size, _ = state = self._state()
            if size < begin:
                raise StoreError(f"{self._path} is shorter than it was; restore it, and start the service again.")
            if size > begin and state != self._read_to_end:
                found = await asyncio.to_thread(self._read, begin)
                if found:
                    return found
                self._read_to_end = state
            if time.monotonic() >= until:
                return []
            await asyncio.sleep(LOOK_EVERY)

    def _state(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def _read(self, begin: int) -> list[Logged]:
        with self._path.open("rb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            data = os.pread(file.fileno(), READ_BYTES, begin)
        *lines, rest = data.split(b"\n")
        if not lines and len(rest) > MAX_ENTRY_BYTES:
            raise StoreError(_damaged(str(self._path), begin))
        if not lines and rest:
            log.warning("the last line of %s was cut off; it was not acknowledged, and is ignored", self._path)
        found = []
        for line in lines:
            end = begin + len(line) + 1
            found.append(Logged(str(end), _decoded(line, str(self._path), begin)))
            begin = end
        return found


class RedisLog:
    """A Redis stream, shared by all replicas. It is as durable as Redis: have that append to a file
    (`appendonly yes`), or a restart of it loses changes."""

    is_durable = True

    def __init__(self, link: RedisLink, key: str) -> None:
        self._link, self._key = link, key

    async def append(self, entries: Sequence[Entry]) -> None:
        values = [encoded(entry) for entry in entries]

        async def add(client: Redis) -> None:
            async with client.pipeline(transaction=True) as pipe:
                for value in values:
                    pipe.xadd(self._key, {FIELD: value})
                await pipe.execute()

        try:
            await self._link.call(add)
        except RedisDown as error:
            raise StoreUnavailable("The log of changes did not answer; try again shortly.") from error
        except RedisError as error:
            raise StoreUnavailable("Redis refused the change; make room in it.") from error

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        until = time.monotonic() + wait
        while True:
            left = until - time.monotonic()
            block = {"block": max(1, int(min(left, BLOCK) * 1000))} if left > 0 else {}
            try:
                streams: Any = await self._link.client.xread({self._key: after or "0"}, READ_ENTRIES, **block)
            except (RedisError, OSError) as error:
                raise StoreUnavailable("The log of changes does not answer; it is asked again.") from error
            if streams:
                found: Any = streams[0][1]
                return [
                    Logged(position.decode(), _decoded(fields.get(FIELD, b""), self._key, position.decode()))
                    for position, fields in found
                ]
            if left <= 0:
                return []


async def read_to_end(log: ChangeLog) -> list[dict[str, Any]]:
    """All entries so far. Raises StoreUnavailable and StoreError."""
    entries, position = [], ""
    while found := await log.read(position):
        entries += [entry for _, entry in found]
        position = found[-1].position
    return entries


def stream_key(prefix: str) -> str:
    """The stream's key in Redis, where those of a service begin with `prefix`."""
    return f"{prefix}:changes"


def encoded(entry: Entry) -> bytes:
    """An entry as it is stored, on one line. Raises RequestError if it is too large."""
    value = json.dumps(entry, separators=(",", ":")).encode()
    if len(value) > MAX_ENTRY_BYTES:
        raise RequestError(f"A change may take {MAX_ENTRY_BYTES} bytes at most; shorten its texts.", "body")
    return value


def check_size(entry: Entry) -> None:
    """Raises RequestError for an entry that is too large, with what every entry gets besides."""
    encoded({**entry, "": "x" * STAMP_BYTES})


def _decoded(value: bytes, store: str, position: str | int) -> dict[str, Any]:
    try:
        entry = json.loads(value)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise StoreError(_damaged(store, position))
    return entry


def _damaged(store: str, position: str | int) -> str:
    return f"The log of changes in {store} is damaged at {position}; restore it from a copy, or remove that entry."


def _end_of_last_line(file: int) -> int:
    """Where the last complete line of a file ends, in bytes."""
    size = os.fstat(file).st_size
    begin = max(0, size - READ_BYTES)
    return begin + os.pread(file, size - begin, begin).rfind(b"\n") + 1
