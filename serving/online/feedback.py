"""What people do with recommendations, kept for learning: in a Redis stream, in files, or only counted.

A record names no user, but the key that stands for one (`receipts.user_key`), by which everything of a user is erased.
The same event on the same item of the same recommendation counts once. What events there are, and what they mean, is
said here for the service and for training.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from redis.exceptions import RedisError

from serving.errors import StorageError, StoreUnavailable
from serving.files import append_whole, atomic_write
from serving.online.redis_link import RedisDown, RedisLink

Record = Mapping[str, Any]

FeedbackEvent = Literal["impression", "click", "like", "dislike", "cart", "purchase", "play", "share"]
IMPRESSION: FeedbackEvent = "impression"  # the only event that does not make its recommendation a hit
EVENTS: tuple[FeedbackEvent, ...] = get_args(FeedbackEvent)
# Events that say what somebody wants: they make an item popular, take it out of rotation, and are trained on.
POSITIVE = tuple(event for event in EVENTS if event not in (IMPRESSION, "dislike"))

DAY = 86_400  # seconds
MAX_SEEN = 200_000  # events that a process without Redis knows as counted
MAX_PENDING = 1000  # records that wait for the disk; beyond them feedback is refused
MAX_FILE_BYTES = 64 << 20
PAGE = 1000  # records of a stream read at once
NAME = re.compile(r"feedback-(\d{4}-\d\d-\d\d)-(\d{4})\.jsonl")


class Added(NamedTuple):
    """is_new: the event had not been counted. is_first_hit: nor had any event of the recommendation but impressions."""

    is_new: bool
    is_first_hit: bool


def stream_key(prefix: str) -> str:
    """The Redis stream of the records. prefix: of the deployment's keys."""
    return f"{prefix}:feedback"


class Feedback(Protocol):
    """is_kept: whether records can be read back, to train on."""

    is_kept: bool

    async def add(self, recommendation_id: str, record: Record) -> Added:
        """Returns once the record is stored. record: `user`, `item_id` and `event`, and all that it is joined with.
        Raises StoreUnavailable; the event has not been counted then."""

    async def count(self, user: str) -> int:
        """How many records of a user are kept, by a pass over all. Raises StoreUnavailable."""

    async def erase(self, user: str) -> None:
        """Erases every record of a user, and forgets that their events were counted: whoever sends one again is told
        the truth. Raises StoreUnavailable."""


def _event_key(recommendation_id: str, record: Record | None = None) -> bytes:
    """Stands for an event on a recommendation; without a record, for the first hit."""
    name = "" if record is None else f"{record['event']} {record['item_id']}"
    return blake2b(f"{recommendation_id} {name}".encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _is_hit(record: Record) -> bool:
    return bool(record["event"] != IMPRESSION)


class LocalFeedback:
    """For a single process: what was counted is remembered in it, records go to files, if there are any."""

    def __init__(self, files: FeedbackFiles | None) -> None:
        self._files, self.is_kept = files, files is not None
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # by user first, so that an erasure finds them
        self._storing: dict[bytes, asyncio.Task[None]] = {}  # events that wait for the disk

    async def add(self, recommendation_id: str, record: Record) -> Added:
        theirs = _of_user(record["user"])
        event, hit = theirs + _event_key(recommendation_id, record), theirs + _event_key(recommendation_id)
        if event in self._seen:
            return Added(False, False)
        if event in self._storing:
            await asyncio.shield(self._storing[event])  # raises what kept the first from being stored
            return Added(False, False)
        self._storing[event] = asyncio.create_task(self._store(event, record))
        await asyncio.shield(self._storing[event])  # it is stored even if nobody waits for it any more
        is_first_hit = _is_hit(record) and hit not in self._seen
        if is_first_hit:
            self._remember(hit)
        return Added(True, is_first_hit)

    async def _store(self, event: bytes, record: Record) -> None:
        try:
            if self._files is not None:
                await self._files.append(record)
            self._remember(event)
        finally:
            del self._storing[event]

    def _remember(self, key: bytes) -> None:
        self._seen[key] = None
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    async def count(self, user: str) -> int:
        return 0 if self._files is None else await self._files.count(user)

    async def erase(self, user: str) -> None:
        if self._files is not None:
            await self._files.erase(user)
        seen, theirs = list(self._seen), _of_user(user)
        for key in await asyncio.to_thread(lambda: [each for each in seen if each.startswith(theirs)]):
            self._seen.pop(key, None)


def _of_user(user: str) -> bytes:
    """What the keys of a user's events begin with."""
    return user.encode() + b" "


class FeedbackFiles:
    """JSON lines in one folder, a new file every day and every MAX_FILE_BYTES. Files older than `retention_days` are
    deleted. Several processes of one machine may share the folder.

    Records that arrive while others are written are written together, with one wait for the disk. A line that was cut
    off by a kill was not acknowledged; who reads the files skips it.
    """

    def __init__(self, folder: Path, retention_days: int) -> None:
        self._folder, self._retention = folder, timedelta(days=retention_days)
        self._lines: list[bytes] = []
        self._next: asyncio.Future[None] | None = None
        self._writing, self._counting = asyncio.Lock(), asyncio.Lock()

    async def append(self, record: Record) -> None:
        """Returns once the record is on the disk. Raises StoreUnavailable."""
        if len(self._lines) >= MAX_PENDING:
            raise StoreUnavailable("The disk does not keep up with the feedback; try again later.")
        self._lines.append(_line(record).encode() + b"\n")
        if self._next is None:
            self._next = asyncio.ensure_future(self._write())
        await asyncio.shield(self._next)

    async def _write(self) -> None:
        async with self._writing:
            lines, self._lines, self._next = self._lines, [], None
            try:
                await asyncio.to_thread(self._append, b"".join(lines))
            except OSError as error:
                raise StoreUnavailable(
                    f"Feedback cannot be written ({error.strerror}); make room on its disk, or correct its rights."
                ) from error

    def _append(self, lines: bytes) -> None:
        with self._locked():
            path = self._newest(datetime.now(UTC))
            with path.open("a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    lines = b"\n" + lines  # a kill cut the last line off
                append_whole(file, lines, end)

    def _newest(self, now: datetime) -> Path:
        """The file to append to. Deletes old files whenever a new one begins."""
        today = f"{now:%Y-%m-%d}"
        files = self._files()
        last = max((number for _, day, number in files if day == today), default=0)
        if last and self._path(today, last).stat().st_size < MAX_FILE_BYTES:
            return self._path(today, last)
        oldest = f"{now - self._retention:%Y-%m-%d}"
        for path, day, _ in files:
            if day < oldest:
                path.unlink()
        return self._path(today, last + 1)

    async def erase(self, user: str) -> None:
        """Rewrites the files that hold something of the user, once what has arrived is in them. Raises
        StoreUnavailable."""
        if self._next is not None:
            await asyncio.wait([self._next])
        try:
            async with self._writing:
                await asyncio.to_thread(self._erase, user)
        except (OSError, StorageError) as error:
            raise StoreUnavailable(
                "Feedback of this user could not be erased from the disk; make room on it, and try again."
            ) from error

    async def count(self, user: str) -> int:
        """How many records of the user the files hold. Raises StoreUnavailable."""
        async with self._counting:  # one pass at a time, however many ask
            try:
                return await asyncio.to_thread(self._count, user)
            except OSError as error:
                raise StoreUnavailable(
                    f"Feedback cannot be read ({error.strerror}); correct the rights of its files."
                ) from error

    def _count(self, user: str) -> int:
        mark, found = _mark(user), 0
        for path, _, _ in self._files() if self._folder.is_dir() else ():
            with suppress(FileNotFoundError), path.open("rb") as file:  # another process may delete an old one
                found += sum(mark in line for line in file)
        return found

    def _erase(self, user: str) -> None:
        mark = _mark(user)
        with self._locked():
            for path, _, _ in self._files():
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if mark not in line]
                if len(kept) < len(lines):
                    with atomic_write(path) as partial:
                        partial.write_bytes(b"".join(kept))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            yield

    def _files(self) -> list[tuple[Path, str, int]]:
        """Path, day and number of each file, oldest first."""
        found = [(path, NAME.fullmatch(path.name)) for path in sorted(self._folder.iterdir())]
        return [(path, name[1], int(name[2])) for path, name in found if name]

    def _path(self, day: str, number: int) -> Path:
        return self._folder / f"feedback-{day}-{number:04d}.jsonl"


# Counts and stores an event. KEYS: event, hit, stream; ARGV: seconds for which an event is known as counted, whether it
# is a hit, most records, id of the oldest record to keep, the user, the record.
ADD = """
if not redis.call('SET', KEYS[1], '', 'NX', 'EX', ARGV[1]) then return {0, 0} end
local hit = 0
if ARGV[2] == '1' and redis.call('SET', KEYS[2], '', 'NX', 'EX', ARGV[1]) then hit = 1 end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'user', ARGV[5], 'record', ARGV[6])
redis.call('XTRIM', KEYS[3], 'MINID', '~', ARGV[4])
return {1, hit}
"""


class RedisFeedback:
    """A Redis stream, shared by all replicas: at most about `max_records`, each for about `retention_days`. An event is
    known as counted for `window` seconds."""

    is_kept = True

    def __init__(self, link: RedisLink, prefix: str, window: int, retention_days: int, max_records: int) -> None:
        self._link, self._prefix, self._stream = link, prefix, stream_key(prefix)
        self._window, self._retention, self._max_records = window, retention_days * DAY, max_records
        self._counting = asyncio.Lock()

    async def add(self, recommendation_id: str, record: Record) -> Added:
        keys = self._seen_keys(recommendation_id, record)
        oldest = max(0, int(1000 * (time.time() - self._retention)))
        is_new, is_first_hit = await self._call(
            "EVAL", ADD, 3, *keys, self._stream,
            self._window, int(_is_hit(record)), self._max_records, oldest, record["user"], _line(record),
        )  # fmt: skip
        return Added(bool(is_new), bool(is_first_hit))

    async def erase(self, user: str) -> None:
        async for records in self._pages(user):
            # What only the records tell goes first: if the call after it fails, they are there to tell it again.
            if seen := [key for record in records.values() for key in self._seen_by(record)]:
                await self._call("DEL", *seen)
            await self._call("XDEL", self._stream, *records)

    async def count(self, user: str) -> int:
        async with self._counting:  # one pass at a time, however many ask
            return sum([len(records) async for records in self._pages(user)])

    async def _pages(self, user: str) -> AsyncIterator[dict[bytes, bytes]]:
        """The records of a user by their id in the stream, as far as a page has any. The stream is read to its end: a
        list of each user's records could be evicted, and would be missed."""
        position = b"-"
        while page := await self._call("XRANGE", self._stream, position, "+", "COUNT", PAGE):
            position = b"(" + page[-1][0]
            theirs = {id: fields.get(b"record", b"") for id, fields in page if fields.get(b"user") == user.encode()}
            if theirs:
                yield theirs

    def _seen_by(self, line: bytes) -> list[str]:
        """Under which keys the event of a kept record is known as counted."""
        try:
            record = json.loads(line)
            return self._seen_keys(record["recommendation_id"], record)
        except (ValueError, KeyError, TypeError):  # not as this service writes it, and to be erased all the same
            return []

    def _seen_keys(self, recommendation_id: str, record: Record) -> list[str]:
        """Of an event, and of its recommendation's first hit."""
        keys = _event_key(recommendation_id, record), _event_key(recommendation_id)
        return [f"{self._prefix}:seen:{key.hex()}" for key in keys]

    async def _call(self, *command: str | bytes | int) -> Any:
        try:
            return await self._link.execute_pipelined(*command)
        except RedisDown as error:
            raise StoreUnavailable("The store of feedback did not answer; try again shortly.") from error
        except RedisError as error:
            raise StoreUnavailable("Redis refused the feedback; make room in it.") from error


def _line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"))


def _mark(user: str) -> bytes:
    """What the lines of a user have, and no others: a quote in a value is escaped."""
    return _line({"user": user})[1:-1].encode()
