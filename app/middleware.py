"""What every request gets, in plain ASGI: an id, a bounded body, headers, metrics, a log line, a trace, and 500s."""

from __future__ import annotations

import logging
import time
from typing import Any

import structlog
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.headers import request_id, with_standard_headers
from app.metrics import Metrics
from app.traces import Traces

log = logging.getLogger("streamrec.http")

QUIET = {"/livez", "/readyz", "/metrics"}
NOT_LOGGED = {429, 503}  # a flood of refusals would flood the log; the metrics count them by reason


class Envelope:
    """max_body_bytes: larger bodies are answered with 413, whether or not they declare their length."""

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces, max_body_bytes: int) -> None:
        self.app, self.metrics, self.traces, self.max_body_bytes = app, metrics, traces, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        sent = dict(scope["headers"])
        own_id = request_id(scope["headers"])
        tokens = structlog.contextvars.bind_contextvars(request_id=own_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = with_standard_headers(message.get("headers", ()), own_id, scope["scheme"])
            await send(message)

        try:
            try:
                await self.app(scope, self._bounded(receive, sent.get(b"content-length", b"")), send_with_headers)
            except Exception as error:
                log.exception("unexpected error")
                if status:
                    raise
                await errors.response(error)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            method, route = scope["method"], route_of(scope)
            self.metrics.answers(route, str(status or 499)).observe(seconds)
            level = logging.DEBUG if route in QUIET or status in NOT_LOGGED else logging.INFO
            if log.isEnabledFor(level):
                fields = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
                log.log(level, "request", extra=fields)
            if self.traces.provider is not None:
                caller = sent.get(b"traceparent", b"").decode("latin-1")
                answer = scope.get("state", {}).get("answer")
                self.traces.record(caller, method, route, status or 499, own_id, seconds, answer)
            structlog.contextvars.reset_contextvars(**tokens)

    def _bounded(self, receive: Receive, declared: bytes) -> Receive:
        left = self.max_body_bytes
        if declared.isdigit() and int(declared) <= left:
            return receive  # the server reads no more than was declared
        too_large = declared.isdigit()

        async def bounded() -> Message:
            nonlocal left
            if not too_large:
                message = await receive()
                left -= len(message.get("body", b""))
                if left >= 0:
                    return message
            raise HTTPException(413, f"The body may hold at most {self.max_body_bytes} bytes; send it in parts.")

        return bounded


class Cors(CORSMiddleware):
    """Starlette's CORS for the configured origins, with refusals as problem details."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return errors.response(
            HTTPException(
                403, "Pages of this origin may not call this service; ask the operator to add it to the CORS origins."
            )
        )


def route_of(scope: Scope) -> str:
    """The route's template, never the path itself: ids must not become labels."""
    route: Any = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "unmatched"
