"""The body of a request, bounded. What nobody wants of it is read by the guard, for the sake of the answer."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive


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


async def read_body(receive: Receive) -> bytes:
    """The whole body, without the generator of `Request.body`, which takes longer. Raises ClientDisconnect, and what
    `receive` does."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body may hold at most {limit} bytes; send it in parts.")
