"""Applies the log of changes to this process, in the log's order and no other, so that all processes end up the same.

Whoever makes a change appends it, and waits until this process has applied it as every other process does.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from serving.errors import StoreError, StoreUnavailable
from serving.online.changelog import ChangeLog, Entry

log = logging.getLogger("streamrec.changes")

WAIT = 0.5  # seconds for the next entry; a log without any is known to answer so often
RETRY = 0.5  # seconds, until a log that does not answer is asked again
APPLY_LIMIT = 30.0  # seconds that whoever made a change waits for it
NOT_FOLLOWED = "The log of changes is damaged, and this process no longer follows it; mend the log, and restart."

# Applies entries of one kind that follow each other, and returns the result of each, or the error that it ended in.
Handler = Callable[[Sequence[Entry]], Awaitable[Sequence[Any]]]


class Changes:
    """handlers: by the kind of entry. position: of the last entry that was applied."""

    def __init__(self, log: ChangeLog, handlers: Mapping[str, Handler]) -> None:
        self.log, self._handlers = log, handlers
        self.position = ""
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._current_at = time.monotonic()
        self._is_at_end, self._answers, self._is_followed = False, True, True

    @property
    def lag(self) -> float:
        """Seconds since this process last knew that it has applied everything."""
        return time.monotonic() - self._current_at

    async def make(self, kind: str, entries: Sequence[Entry]) -> list[Any]:
        """Appends entries of one kind; returns the result of each once it is applied here, which may be an error.

        Raises StoreUnavailable and RequestError."""
        if not self._is_followed:  # it would be stored, and never be applied here
            raise StoreUnavailable(NOT_FOLLOWED)
        stamped = [{"kind": kind, "id": uuid.uuid4().hex, "at": time.time(), **entry} for entry in entries]
        results = {entry["id"]: asyncio.get_running_loop().create_future() for entry in stamped}
        self._waiting |= results
        try:
            await self.log.append(stamped)
            async with asyncio.timeout(APPLY_LIMIT):
                return await asyncio.gather(*results.values())
        except TimeoutError:
            raise StoreUnavailable("The change is stored and not yet applied here; look again shortly.") from None
        finally:
            for made in results:
                del self._waiting[made]

    async def replay(self) -> None:
        """Applies what the log holds. Raises StoreError.

        A log that does not answer keeps nobody waiting: `follow` makes up for it."""
        while not self._is_at_end and self._answers:
            await self._next(wait=0.0)

    async def follow(self) -> None:
        """Applies what is appended, until it is cancelled or the log has become unusable."""
        try:
            while True:
                await self._next(WAIT if self._is_at_end else 0.0)
        except StoreError as error:
            log.error("changes are no longer followed, restart the service: %s", error)
            self._is_followed = False
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(StoreUnavailable(NOT_FOLLOWED))

    async def _next(self, wait: float) -> None:
        try:
            found = await self.log.read(self.position, wait)
        except StoreUnavailable as error:
            if self._answers:
                log.warning("changes are not followed until their log answers: %s", error)
            self._answers = False
            await asyncio.sleep(RETRY)
            return
        self._answers, self._is_at_end = True, not found
        for kind, group in groupby(found, lambda logged: str(logged.entry.get("kind"))):
            await self._apply(kind, [logged.entry for logged in group])
        if found:
            self.position = found[-1].position
        else:
            self._current_at = time.monotonic()

    async def _apply(self, kind: str, entries: Sequence[Entry]) -> None:
        handler = self._handlers.get(kind)
        if handler is None:
            log.warning("a change of kind %r is not known here; a newer version made it", kind[:64])
            return
        try:
            results = await handler(entries)
        except Exception as error:  # the other processes meet it too, and all go on behind it
            log.exception("changes of kind %s could not be applied", kind)
            results = [error] * len(entries)
        for entry, result in zip(entries, results, strict=True):
            waiting = self._waiting.get(str(entry.get("id")))
            if waiting is not None and not waiting.done():
                waiting.set_result(result)
            elif isinstance(result, Exception):  # whoever made the change was told, by its own process
                log.warning("a change of kind %s could not be applied: %s", kind, result)
