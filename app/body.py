"""The body of a request: bounded, and read to its end even where nobody wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from fastapi import HTTPException
from starlette.types import Message, Receive

LINGER_S = 2.0  # after an answer, longest wait for the rest of a body
DISCARDED_BYTES = 4 << 20  # most that is read of it


class Body:
    """limit: bytes; `receive` raises HTTPException 413 once more than that has come. has_left: the client."""

    __slots__ = ("_left", "_limit", "_receive", "has_left", "is_read")

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._left = receive, limit, limit
        self.has_left = False
        self.is_read = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self.is_read = not message.get("more_body", False)
        self.has_left |= message["type"] == "http.disconnect"
        if self._left < 0:
            raise too_large(self._limit)
        return message

    async def discard(self) -> None:
        """Reads what is left. A connection that is closed on a client that still sends is reset, and the client may
        never see its answer."""
        left = DISCARDED_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self.is_read and left > 0:
                    message = await self._receive()
                    self.is_read = not message.get("more_body", False)  # neither has a client that has gone
                    left -= len(message.get("body", b""))


def too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body may hold at most {limit} bytes; send it in parts.")
