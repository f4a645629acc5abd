"""One table: error -> problem details (RFC 9457). Everything that goes wrong leaves the service in this form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from app.schemas import Problem
from serving.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    NotReady,
    Overloaded,
    RequestError,
    ServingError,
    UnknownCatalogue,
)
from serving.online.users import StoreUnavailable

RETRY_AFTER = 1  # seconds, where nothing better is known


class NotFound(ServingError):
    """There is no such user, item or page."""


class Unauthorised(ServingError):
    """A key is needed and none was sent."""


class Forbidden(ServingError):
    """The key that was sent may not do this."""


class QuotaExceeded(ServingError):
    """The client has asked for more than its quota. `retry_after`: seconds until there is room again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# error -> (status, name, title); a class that is not here counts as the one it is made from
PROBLEMS: dict[type, tuple[int, str, str]] = {
    UnknownCatalogue: (404, "unknown-catalogue", "Unknown catalogue"),
    RequestError: (422, "invalid-request", "The request does not fit"),
    NotFound: (404, "not-found", "Not found"),
    Unauthorised: (401, "unauthorised", "A key is needed"),
    Forbidden: (403, "forbidden", "The key is not valid"),
    QuotaExceeded: (429, "over-quota", "Over the quota"),
    Overloaded: (503, "overloaded", "Overloaded"),
    Draining: (503, "draining", "Shutting down"),
    NotReady: (503, "not-ready", "Not ready"),
    EngineDead: (503, "engine-dead", "The engine has stopped"),
    StoreUnavailable: (503, "store-unavailable", "The store cannot be reached"),
    DeadlineExceeded: (504, "deadline-exceeded", "Out of time"),
}
HTTP_NAMES = {
    400: ("invalid-request", "The request does not fit"),
    403: ("forbidden", "Not allowed"),
    404: ("not-found", "Not found"),
    405: ("method-not-allowed", "Method not allowed"),
    413: ("too-large", "The body is too large"),
}
REJECTIONS = (401, 403, 413, 429, 503, 504)
MEANINGS = {
    401: "no key was sent",
    403: "the key may not do this",
    404: "there is no such thing",
    413: "the body is too large",
    422: "the request does not fit",
    429: "over the client's quota",
    503: "not ready, overloaded or draining, or the store cannot be reached",
    504: "nothing fits the time budget",
}


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How OpenAPI tells of these errors; a route with a key has four in any case."""
    schema = {"$ref": "#/components/schemas/Problem"}  # BatchResponse brings it into the document
    wait = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
    return {
        status: {
            "description": MEANINGS[status],
            "content": {"application/problem+json": {"schema": schema}},
            "headers": wait if status in (429, 503) else {},
        }
        for status in sorted({401, 403, 429, 503, *statuses})
    }


def problem(error: Exception) -> Problem:
    """The problem details of any error; what nobody foresaw becomes a 500 that tells nothing of the inside."""
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _validation_problem(error.errors())
    if isinstance(error, HTTPException):
        status = 422 if error.status_code == 400 else error.status_code  # 400: a body that is no JSON at all
        name, title = HTTP_NAMES.get(error.status_code, ("http-error", str(error.detail)))
        return _make(status, name, title, str(error.detail), field="body" if error.status_code in (400, 413) else None)
    kind = next((base for base in type(error).__mro__ if base in PROBLEMS), None)
    if kind is None:
        return _make(500, "internal-error", "Internal error", "Something went wrong; the log has it under this id.")
    wait = getattr(error, "retry_after", RETRY_AFTER if PROBLEMS[kind][0] == 503 else None)
    return _expected(kind, str(error), getattr(error, "field", None), None if wait is None else max(1, math.ceil(wait)))


@lru_cache(256)  # under a flood, one and the same refusal is most of what is said
def _expected(kind: type, detail: str, field: str | None, retry_after: int | None) -> Problem:
    status, name, title = PROBLEMS[kind]
    return _make(status, name, title, detail, field=field, retry_after=retry_after)


def _make(status: int, name: str, title: str, detail: str, **more: Any) -> Problem:
    return Problem(type=f"urn:streamrec:problem:{name}", title=title, status=status, detail=detail, **more)


def _validation_problem(errors: Iterable[Any]) -> Problem:
    found = [{"field": _field(error), "detail": error["msg"].removeprefix("Value error, ")} for error in errors]
    first = found[0]
    where = f"{first['field']}: " if first["field"] else ""
    return _make(
        422, "invalid-request", "The request does not fit", where + first["detail"],
        field=first["field"] or None, errors=found if len(found) > 1 else None,
    )  # fmt: skip


def _field(error: Any) -> str:
    """The dotted name of what does not fit; positions in a text that is no JSON are no field."""
    if error["type"] == "json_invalid":
        return "body"
    location = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
    if not location and "beam_width" in error["msg"]:
        return "k"
    return ".".join(location) or "body"


def response(error: Exception, details: Problem | None = None) -> Response:
    details = details or problem(error)
    headers = {} if details.retry_after is None else {"Retry-After": str(details.retry_after)}
    if details.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    body = details.model_dump_json(exclude_none=True)
    return Response(body, details.status, headers, media_type="application/problem+json")


def reason(details: Problem) -> str:
    """A short name for the metric of rejections."""
    return details.type.rpartition(":")[2].replace("-", "_")


EXPECTED = (ServingError, RequestValidationError, HTTPException)


async def handle(request: Request, error: Exception) -> Response:
    details = problem(error)
    if details.status in REJECTIONS:
        request.app.state.service.metrics.rejections(reason(details)).inc()
    return response(error, details)


def install(app: FastAPI) -> None:
    for kind in EXPECTED:
        app.add_exception_handler(kind, handle)
