"""Every error as problem details (RFC 9457), from one table: errors leave the service in no other form."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.schemas.common import HistoryEvent, Problem
from serving.errors import (
    Conflict,
    DeadlineExceeded,
    Draining,
    EngineDead,
    NoSemanticId,
    NotReady,
    Overloaded,
    RequestError,
    ServingError,
    StoreUnavailable,
    UnknownCatalogue,
    UnknownModel,
)

RETRY_AFTER = 1  # seconds, where there is no better estimate


class NotFound(ServingError):
    """There is no such user, item or page."""


class UnknownScenario(RequestError):
    """A request names a scenario that does not exist."""


class UnfitBundle(RequestError):
    """A request names a bundle that cannot be served."""


class MalformedRequest(ServingError):
    """What a client sent is not a request, or one that two parsers could read differently."""


class HeadTooLarge(ServingError):
    """A request's head has too many bytes or fields."""


class TooSlow(ServingError):
    """A client took too long to send its request."""


class Unauthorised(ServingError):
    """A key is required and none was sent."""


class Forbidden(ServingError):
    """The key that was sent does not permit this."""


class HostNotAllowed(ServingError):
    """The request asks for a host by a name that the service is not known under."""


class QuotaExceeded(ServingError):
    """The client is over its quota. retry_after: seconds until its next request is permitted."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# error -> (status, name, title); a class that is not listed counts as its base class
PROBLEMS: dict[type, tuple[int, str, str]] = {
    UnknownScenario: (404, "unknown-scenario", "Unknown scenario"),
    UnknownCatalogue: (404, "unknown-catalogue", "Unknown catalogue"),
    RequestError: (422, "invalid-request", "Invalid request"),
    UnfitBundle: (422, "unfit-bundle", "The bundle does not fit"),
    NoSemanticId: (409, "no-semantic-id", "No semantic ID"),
    NotFound: (404, "not-found", "Not found"),
    UnknownModel: (404, "unknown-model", "Unknown model"),
    Conflict: (409, "conflict", "In conflict with what is deployed"),
    Unauthorised: (401, "unauthorised", "A key is required"),
    Forbidden: (403, "forbidden", "Invalid key"),
    HostNotAllowed: (403, "host-not-allowed", "Host not allowed"),
    MalformedRequest: (400, "malformed-request", "Malformed request"),
    TooSlow: (408, "too-slow", "The request took too long"),
    QuotaExceeded: (429, "over-quota", "Over the quota"),
    HeadTooLarge: (431, "head-too-large", "The head is too large"),
    Overloaded: (503, "overloaded", "Overloaded"),
    Draining: (503, "draining", "Shutting down"),
    NotReady: (503, "not-ready", "Not ready"),
    EngineDead: (503, "engine-dead", "The engine has stopped"),
    StoreUnavailable: (503, "store-unavailable", "The store is unavailable"),
    DeadlineExceeded: (504, "deadline-exceeded", "Deadline exceeded"),
}
HTTP_NAMES = {
    400: ("invalid-request", "Invalid request"),
    403: ("forbidden", "Not allowed"),
    404: ("not-found", "Not found"),
    405: ("method-not-allowed", "Method not allowed"),
    413: ("too-large", "The body is too large"),
    415: ("compressed", "The body is compressed"),
}
ROUTING = {  # what the router says of a path, in a sentence
    404: "There is no such path, to the letter; /docs lists all.",
    405: "This path does not take this method; /docs lists those it takes.",
}
ID_KIND, EVENT_KIND = "constrained-str", HistoryEvent.__name__  # what a history's entry may be, as pydantic says it
KEY = "[key]"  # what it puts after a key that is wrong itself
REJECTIONS = (401, 403, 413, 429, 503, 504)
MEANINGS = {
    401: "a key is required and none was sent",
    403: "the key is not valid, or no admin key where one is needed",
    404: "not found",
    409: "the change does not fit what is served, or an item can get no semantic ID",
    413: "the body is too large",
    415: "the body is compressed",
    422: "the request is not valid",
    429: "over the client's quota",
    503: "not ready, overloaded or draining, or the store is unavailable",
    504: "no search fits the time budget",
}


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors for a route's `responses` in OpenAPI; every route with a key has 401, 403, 429 and 503."""
    schema = {"$ref": "#/components/schemas/Problem"}  # BatchResponse defines it in the document
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
    """The problem details of any error; an unexpected one becomes a 500 that reveals nothing."""
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _validation_problem(error.errors())
    if isinstance(error, HTTPException):
        status = 422 if error.status_code == 400 else error.status_code  # 400: the body is not JSON
        name, title = HTTP_NAMES.get(error.status_code, ("http-error", str(error.detail)))
        detail = ROUTING.get(error.status_code, str(error.detail))
        return _make(status, name, title, detail, field="body" if error.status_code in (400, 413, 415) else None)
    kind = next((base for base in type(error).__mro__ if base in PROBLEMS), None)
    if kind is None:
        return _make(
            500,
            "internal-error",
            "Internal error",
            "Something went wrong; search the log for this request's X-Request-ID.",
        )
    wait = getattr(error, "retry_after", RETRY_AFTER if PROBLEMS[kind][0] == 503 else None)
    return _expected(
        kind,
        str(error),
        getattr(error, "field", None),
        getattr(error, "position", None),
        None if wait is None else max(1, math.ceil(wait)),
    )


@lru_cache(256)  # under a flood, most answers are the same refusal
def _expected(kind: type, detail: str, field: str | None, position: int | None, retry_after: int | None) -> Problem:
    status, name, title = PROBLEMS[kind]
    return _make(status, name, title, detail, field=field, position=position, retry_after=retry_after)


def _make(status: int, name: str, title: str, detail: str, **more: Any) -> Problem:
    return Problem(type=f"urn:streamrec:problem:{name}", title=title, status=status, detail=detail, **more)


def _validation_problem(errors: Iterable[Any]) -> Problem:
    meant = [error for error in errors if not _of_other_kind(error)]
    found = [{"field": _field(error), "detail": _detail(error)} for error in meant]
    first = found[0]
    where = f"{first['field']}: " if first["field"] else ""
    return _make(
        422, "invalid-request", "Invalid request", where + first["detail"],
        field=first["field"] or None, errors=found if len(found) > 1 else None,
    )  # fmt: skip


def _of_other_kind(error: Any) -> bool:
    """Whether a history's entry was refused as what it was not meant to be: an id as an event, or an event as an id."""
    kind = error["loc"][-1] if error["loc"] else None
    if kind == EVENT_KIND:
        return bool(error["type"] == "model_type")
    return kind == ID_KIND and error["type"] == "string_type" and isinstance(error["input"], dict)


def _detail(error: Any) -> str:
    """What is wrong, in words that name no class of ours."""
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "Input should be an object"
    detail = str(error["msg"]).removeprefix("Value error, ")
    return f"as a name: {detail}" if error["loc"] and error["loc"][-1] == KEY else detail


def _field(error: Any) -> str:
    """The dotted name of the offending field; a position in text that is not JSON names no field."""
    if error["type"] == "json_invalid":
        return "body"
    location = _location(error)
    if location and location[0] in ("body", "query", "path", "header"):
        del location[0]
    if not location and "beam_width" in error["msg"]:
        return "k"
    if not location and "explore" in error["msg"]:
        return "explore"
    return ".".join(location) or "body"


def _location(error: Any) -> list[str]:
    """Where an error is, without what pydantic adds: after an index what a history's entry may be, at a key's end KEY.
    The name of a field that does not exist may be anything."""
    parts = list(error["loc"])
    last = [parts.pop()] if error["type"] == "extra_forbidden" else []
    inner = [
        part for before, part in pairwise((None, *parts))
        if part != KEY and not (isinstance(before, int) and part in (ID_KIND, EVENT_KIND))
    ]  # fmt: skip
    return [str(part) for part in (*inner, *last)]


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
    if isinstance(error, HTTPException) and error.status_code == 405:
        error.headers = {"Allow": ", ".join(_methods(request))}
    if details.status in REJECTIONS:
        request.app.state.service.metrics.rejections(reason(details)).inc()
    return response(error, details)


def _methods(request: Request) -> list[str]:
    """All that the path takes; the router names those of its first route alone."""

    def is_taken(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    methods = [method for method in ("DELETE", "GET", "POST", "PUT") if is_taken(method)]
    return sorted([*methods, "HEAD"]) if "GET" in methods else methods


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]
HANDLERS = dict.fromkeys(EXPECTED, handle)
