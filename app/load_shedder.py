"""While the queue is full, or a client is over its quota, requests are refused before anything else is done.

Under a flood, refusals are most of the work, and every microsecond they take is taken from the searches.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors
from app.errors import QuotaExceeded
from app.headers import request_id, with_standard_headers
from app.lifecycle import Service
from app.quotas import Quotas
from app.security import client_of
from serving.errors import Overloaded, ServingError

PATHS = {"/recommend", "/rank"}


class LoadShedder:
    """The outermost layer of the application. What it refuses is counted in the metrics, but neither logged nor traced.

    It refuses only what it can refuse cheaply: a request from a page of another origin, whose answer needs more
    headers, or with a body that is too large or of unknown length, is left to the layers further in.
    """

    def __init__(self, app: ASGIApp, service: Service, quotas: Quotas) -> None:
        self.app, self.service, self.quotas = app, service, quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        error = self._refusal(scope)
        if error is None or not self._is_simple(scope):
            return await self.app(scope, receive, send)
        wait = max(1, math.ceil(error.retry_after))
        response, reason = _rendered(type(error), str(error), wait)  # type: ignore[arg-type]  # a class is hashable
        headers = with_standard_headers(response.raw_headers, request_id(scope["headers"]), scope["scheme"])
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        self.service.metrics.rejections(reason).inc()
        self.service.metrics.answers(scope["path"], str(response.status_code)).observe(time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> Overloaded | QuotaExceeded | None:
        """The error to refuse the request with, if any. With quotas configured, a full queue is left to the layers
        further in: whether the client is over its quota comes first, and takes counting."""
        client = client_of(scope, bool(self.service.settings.api_keys))
        if self.service.settings.quota:
            return self.quotas.refusal(client)
        try:
            self.service.admission.decide(client=client)
        except Overloaded as error:
            return error
        except ServingError:  # not ready, draining or dead: the route says which
            return None
        return None

    def _is_simple(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        return "origin" not in headers and length.isdigit() and int(length) <= self.service.settings.max_body_bytes


@lru_cache(256)
def _rendered(kind: type[Overloaded | QuotaExceeded], message: str, wait: int) -> tuple[Response, str]:
    """The cached response for a refusal, and its reason in the metrics."""
    error = kind(message, wait)
    return errors.response(error), errors.reason(errors.problem(error))
