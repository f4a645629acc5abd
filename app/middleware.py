"""What every request gets, in plain ASGI: an id, a bounded body, headers, metrics, a log line, a trace, and 500s."""

from __future__ import annotations

import logging
import time
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors, logs
from app.body import Body
from app.errors import HostNotAllowed
from app.headers import REFUSED, id_of, with_standard_headers
from app.metrics import Metrics
from app.security import Hosts
from app.traces import TRACE_CONTEXT, Traces

log = logging.getLogger("streamrec.http")

QUIET = {"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
NOT_LOGGED = {429, 503}  # a flood of refusals would flood the log; the metrics count them by reason


class RequestMiddleware:
    """max_body_bytes: larger bodies are answered with 413, whether or not they declare their length. What answers GET
    answers HEAD."""

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces, hosts: Hosts, max_body_bytes: int) -> None:
        self.app, self.metrics, self.traces, self.hosts = app, metrics, traces, hosts
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        sent, method = dict(scope["headers"]), scope["method"]
        body = Body(sent, receive, self.max_body_bytes)
        own_id = id_of(scope)
        context = logs.current_request.set(own_id)
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = 499 if body.has_left else message["status"]  # nobody sees the answer
                headers = with_standard_headers(message.get("headers", ()), own_id, scope["scheme"])
                if not body.is_read and b"expect" in sent:  # what was not asked for is not sent
                    headers.append((b"connection", b"close"))
                await send({**message, "headers": headers})
                return
            if method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            try:
                if not self.hosts.permit(sent.get(b"host", b"")):
                    raise HostNotAllowed("The service is not known by this name; add it to STREAMREC_ALLOWED_HOSTS.")
                await self.app(scope, body.receive, send_with_headers)
            except HostNotAllowed as error:
                self.metrics.rejections("host_not_allowed").inc()
                await errors.response(error)(scope, receive, send_with_headers)
            except ClientDisconnect:
                pass  # in the middle of its body: nobody is left to answer
            except Exception as error:
                log.exception("unexpected error")
                if status:
                    raise
                await errors.response(error)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            status, route = scope["state"].get(REFUSED) or status or 499, route_of(scope)
            self.metrics.answers(route, str(status)).observe(seconds)
            level = logging.DEBUG if route in QUIET or status in NOT_LOGGED else logging.INFO
            fields = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
            log.log(level, "request", extra=fields)
            if self.traces.provider is not None:
                caller = {name: sent.get(name.encode(), b"").decode("latin-1") for name in TRACE_CONTEXT}
                answer = scope.get("state", {}).get("answer")
                self.traces.record(caller, method, route, status, own_id, seconds, answer)
            logs.current_request.reset(context)


class Cors(CORSMiddleware):
    """Starlette's CORS for the configured origins, with refusals as problem details."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID", *TRACE_CONTEXT],
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
