"""What surrounds every request, in plain ASGI: its id, the body's bound, headers, metrics, one log line, and 500s."""

from __future__ import annotations

import logging
import re
import time
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors, logs
from app.metrics import Metrics

log = logging.getLogger("streamrec.http")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
CONTENT_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# The interactive documentation is FastAPI's page: scripts from a CDN and one inline.
DOCS_POLICY = (
    "default-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com; "
    "script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net"
)
QUIET = {"/livez", "/readyz", "/metrics"}


class Envelope:
    """`max_body_bytes`: larger bodies are answered with 413, whether they say their length or not."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        token = logs.request_id.set(request_id)
        policy = DOCS_POLICY if scope["path"].startswith("/docs") else CONTENT_POLICY

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "no-referrer"
                out["Content-Security-Policy"] = policy
                out.setdefault("Cache-Control", "no-store")
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
            route = route_of(scope)
            self.metrics.request_seconds.labels(route, str(status or 499)).observe(seconds)
            level = logging.DEBUG if route in QUIET else logging.INFO
            fields = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 2)}
            log.log(level, "request", extra={"fields": fields})
            logs.request_id.reset(token)

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


def route_of(scope: Scope) -> str:
    """The route's template, never the path itself: ids must not become labels."""
    route = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "unmatched"
