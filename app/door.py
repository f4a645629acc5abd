"""The door: while the queue is full, requests for recommendations are refused before they become requests.

Under a flood, refusals are most of the work, and what they cost is taken from the searches. An ASGI application costs a
task, a scope and several coroutines before its first line is reached; here a refusal is one write to the connection.
"""

from __future__ import annotations

import math
import time
from asyncio import AbstractEventLoop
from functools import lru_cache
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app import errors
from app.ids import fresh_id
from app.middleware import ALWAYS, NO_STORE, REQUEST_ID
from app.service import Service
from serving.batcher import NO_ROOM
from serving.errors import Overloaded

PATH = b"/recommend"


class Door(HttpToolsProtocol):
    """uvicorn's protocol for one connection, with refusals of its own: counted, neither logged nor traced.

    The body is read, and thrown away: one left unread would reset the connection, and the refusal be lost. What is not
    plain (pages of other origins, bodies of unknown length, clients that do not read) is left to the application.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.service: Service = config.app.state.service  # type: ignore[union-attr]
        self.wait: float | None = None  # seconds to be told to whom is being refused
        self.began = 0.0

    def on_headers_complete(self) -> None:
        self.wait = self.service.full_for()
        if self.wait is not None and self._is_plain():
            self.began = time.perf_counter()
        else:
            self.wait = None
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.wait is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.wait is None:
            super().on_message_complete()
            return
        head, body = _refusal(max(1, math.ceil(self.wait)))
        keep = self.parser.should_keep_alive()
        headers = [*self.server_state.default_headers, (b"x-request-id", self._request_id())]
        if not keep:
            headers.append((b"connection", b"close"))
        self.transport.write(head + _lines(headers) + b"\r\n" + body)
        self.service.metrics.rejections("overloaded").inc()
        self.service.metrics.answers(PATH.decode(), "503").observe(time.perf_counter() - self.began)
        if not keep:
            self.transport.close()
        self.on_response_complete()

    def _is_plain(self) -> bool:
        if self.parser.get_method() != b"POST" or self.url.partition(b"?")[0] != PATH:
            return False
        if self.parser.should_upgrade() or self.expect_100_continue or self.flow.write_paused:
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False  # answers leave in the order of the requests
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"")
        return (
            b"origin" not in headers
            and b"transfer-encoding" not in headers
            and length.isdigit()
            and int(length) <= self.service.settings.max_body_bytes
        )

    def _request_id(self) -> bytes:
        sent = dict(self.headers).get(b"x-request-id", b"")
        return sent if REQUEST_ID.fullmatch(sent.decode("latin-1")) else fresh_id().encode()


@lru_cache(256)
def _refusal(wait: int) -> tuple[bytes, bytes]:
    """What all refusals share that tell of so many seconds: the head as far as that, and the body."""
    response = errors.response(Overloaded(NO_ROOM, wait))
    return STATUS_LINE[503] + _lines([*response.raw_headers, *ALWAYS, NO_STORE]), bytes(response.body)


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
