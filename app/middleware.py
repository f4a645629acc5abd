"""What surrounds every request, in plain ASGI: its id, the body's bound, headers, metrics, log, trace, and 500s."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

import structlog
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.metrics import Metrics
from app.traces import Traces

log = logging.getLogger("streamrec.http")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
SECURITY_HEADERS = {
    # Everything a page needs comes from the service itself: no inline code, no other host.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
HTTPS_ONLY = "max-age=31536000"
QUIET = {"/livez", "/readyz", "/metrics"}


class Envelope:
    """`max_body_bytes`: larger bodies are answered with 413, whether they say their length or not."""

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces, max_body_bytes: int) -> None:
        self.app, self.metrics, self.traces, self.max_body_bytes = app, metrics, traces, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        tokens = structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                out.setdefault("Cache-Control", "no-store")
                for name, value in SECURITY_HEADERS.items():
                    out[name] = value
                if scope["scheme"] == "https":
                    out["Strict-Transport-Security"] = HTTPS_ONLY
            await send(message)

        try:
            try:
                await self.app(scope, self._bounded(receive, headers), send_with_headers)
            except Exception as error:
                log.exception("unexpected error")
                if status:
                    raise
                await errors.response(error)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            method, route = scope["method"], route_of(scope)
            self.metrics.request_seconds.labels(route, str(status or 499)).observe(seconds)
            level = logging.DEBUG if route in QUIET else logging.INFO
            fields = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
            log.log(level, "request", extra=fields)
            answer = scope.get("state", {}).get("answer")
            self.traces.record(headers, method, route, status or 499, request_id, seconds, answer)
            structlog.contextvars.reset_contextvars(**tokens)

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        received = 0
        announced = headers.get("content-length", "0")
        too_large = HTTPException(413, f"The body may hold at most {self.max_body_bytes} bytes; send it in parts.")

        async def bounded() -> Message:
            nonlocal received
            if announced.isdigit() and int(announced) > self.max_body_bytes:
                raise too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise too_large
            return message

        return bounded


class Cors(CORSMiddleware):
    """Starlette's, with the origins of the settings; what it refuses is told like every other error."""

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
        return errors.response(HTTPException(403, "Pages of this origin may not ask for this; ask the operator."))


def route_of(scope: Scope) -> str:
    """The route's template, never the path itself: ids must not become labels."""
    route: Any = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "unmatched"
