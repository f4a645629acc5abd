"""The door: while the queue is full, or a client over its quota, a request is refused before it becomes one.

Under a flood, refusals are most of the work, and what they cost is taken from the searches. An ASGI application costs a
task, a scope and several coroutines before its first line is reached; here a refusal is one write to the connection.
"""

from __future__ import annotations

import hashlib
import math
import time
from asyncio import AbstractEventLoop
from functools import lru_cache
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app import errors
from app.errors import QuotaExceeded
from app.headers import ALWAYS, NO_STORE, REQUEST_ID
from app.ids import fresh_id
from app.lifecycle import Service
from app.quotas import Quotas
from serving.errors import Overloaded
from serving.online.batcher import NO_ROOM

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
        state = config.app.state  # type: ignore[union-attr]
        self.service: Service = state.service
        self.quotas: Quotas = state.quotas
        self.behind_proxies = self.app
        self.direct: Any = config.app
        self.refused: Overloaded | QuotaExceeded | None = None  # why, of the request that is being read
        self.began = 0.0

    def on_headers_complete(self) -> None:
        # uvicorn's layer that trusts proxies asks at every request whether the peer is one, even where none spoke.
        forwarded = any(name.startswith(b"x-forwarded-") for name, _ in self.headers)
        self.app = self.behind_proxies if forwarded else self.direct
        self.refused = self._refusal() if self.url.partition(b"?")[0] == PATH else None
        if self.refused is not None and self._is_plain():
            self.began = time.perf_counter()
        else:
            self.refused = None
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.refused is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.refused is None:
            super().on_message_complete()
            return
        kind, wait = type(self.refused), max(1, math.ceil(self.refused.retry_after))
        head, body, reason = _told(kind, str(self.refused), wait)  # type: ignore[arg-type]
        keep = self.parser.should_keep_alive()
        headers = [*self.server_state.default_headers, (b"x-request-id", self._request_id())]
        if not keep:
            headers.append((b"connection", b"close"))
        self.transport.write(head + _lines(headers) + b"\r\n" + body)
        metrics, status = self.service.metrics, head[9:12].decode()
        metrics.rejections(reason).inc()
        metrics.answers(PATH.decode(), status).observe(time.perf_counter() - self.began)
        if not keep:
            self.transport.close()
        self.on_response_complete()

    def _refusal(self) -> Overloaded | QuotaExceeded | None:
        """What the request is to be refused with. Where there are quotas, a full queue is left to the application: over
        the quota is another refusal, and it takes counting to know."""
        settings = self.service.settings
        if not settings.quota:
            wait = self.service.full_for()
            return None if wait is None else Overloaded(NO_ROOM, wait)
        headers = dict(self.headers)
        if settings.api_keys:
            return self.quotas.refusal(hashlib.sha256(headers.get(b"x-api-key", b"")).hexdigest())
        if b"x-forwarded-for" in headers or self.client is None:
            return None  # behind a proxy, it takes the application to know who asks
        return self.quotas.refusal(self.client[0])

    def _is_plain(self) -> bool:
        if self.parser.get_method() != b"POST":
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
def _told(kind: type[Overloaded | QuotaExceeded], message: str, wait: int) -> tuple[bytes, bytes, str]:
    """What all refusals of a kind share that tell of so many seconds: the head as far as that, the body, the reason."""
    error = kind(message, wait)
    response, reason = errors.response(error), errors.reason(errors.problem(error))
    head = STATUS_LINE[response.status_code] + _lines([*response.raw_headers, *ALWAYS, NO_STORE])
    return head, bytes(response.body), reason


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
