"""Every error as problem details (RFC 9457), from one table: errors leave the service in no other form."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """What all problems of a kind have in common. detail: None where each error says its own."""

    status: int
    name: str
    title: str
    detail: str | None = None
    field: str | None = None


# By error; a class that is not listed counts as its base class. What the framework raises, by its status.
PROBLEMS: dict[type | int, Kind] = {
    UnknownScenario: Kind(404, "unknown-scenario", "Unknown scenario"),
    UnknownCatalogue: Kind(404, "unknown-catalogue", "Unknown catalogue"),
    RequestError: Kind(422, "invalid-request", "Invalid request"),
    UnfitBundle: Kind(422, "unfit-bundle", "The bundle does not fit"),
    NoSemanticId: Kind(409, "no-semantic-id", "No semantic ID"),
    NotFound: Kind(404, "not-found", "Not found"),
    UnknownModel: Kind(404, "unknown-model", "Unknown model"),
    Conflict: Kind(409, "conflict", "Conflicts with the current deployment"),
    Unauthorised: Kind(401, "unauthorised", "A key is required"),
    Forbidden: Kind(403, "forbidden", "Invalid key"),
    HostNotAllowed: Kind(403, "host-not-allowed", "Host not allowed"),
    MalformedRequest: Kind(400, "malformed-request", "Malformed request"),
    TooSlow: Kind(408, "too-slow", "The request took too long"),
    QuotaExceeded: Kind(429, "over-quota", "Over the quota"),
    HeadTooLarge: Kind(431, "head-too-large", "The head is too large"),
    Overloaded: Kind(503, "overloaded", "Overloaded"),
    Draining: Kind(503, "draining", "Shutting down"),
    NotReady: Kind(503, "not-ready", "Not ready"),
    EngineDead: Kind(503, "engine-dead", "The engine has stopped"),
    StoreUnavailable: Kind(503, "store-unavailable", "The store is unavailable"),
    DeadlineExceeded: Kind(504, "deadline-exceeded", "Deadline exceeded"),
    400: Kind(422, "invalid-request", "Invalid request", field="body"),  # the body is not JSON
    403: Kind(403, "forbidden", "Not allowed"),
    404: Kind(404, "not-found", "Not found", "There is no such path, to the letter; /docs lists all."),
    405: Kind(
        405,
        "method-not-allowed",
        "Method not allowed",
        "This path does not take this method; /docs lists those it takes.",
    ),
    413: Kind(413, "too-large", "The body is too large", field="body"),
    415: Kind(415, "compressed", "The body is compressed", field="body"),
}
INTERNAL = Kind(
    500, "internal-error", "Internal error", "Something went wrong; search the log for this request's X-Request-ID."
)
ID_KIND, EVENT_KIND = "constrained-str", HistoryEvent.__name__  # what a history's entry may be, as pydantic says it
KEY = "[key]"  # what it puts after a key that is wrong itself
REJECTIONS = (401, 403, 413, 429, 503, 504)  # statuses that count as refusals
BY_GUARD = (400, 408, 431)  # others that do, of requests that reach no route
MEANINGS = {  # of statuses, in OpenAPI
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
        detail = str(error.detail)
        return _made(PROBLEMS.get(error.status_code, Kind(error.status_code, "http-error", detail)), detail)
    kind = next((PROBLEMS[base] for base in type(error).__mro__ if base in PROBLEMS), INTERNAL)
    if kind is INTERNAL:
        return _made(INTERNAL)
    wait = getattr(error, "retry_after", RETRY_AFTER if kind.status == 503 else None)
    return _expected(
        kind,
        str(error),
        getattr(error, "field", None),
        getattr(error, "position", None),
        None if wait is None else max(1, math.ceil(wait)),
    )


def _made(
    kind: Kind,
    detail: str = "",
    field: str | None = None,
    position: int | None = None,
    retry_after: int | None = None,
    errors: list[dict[str, str]] | None = None,
) -> Problem:
    return Problem(
        type=f"urn:streamrec:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=kind.detail or detail,
        field=field or kind.field,
        position=position,
        errors=errors,
        retry_after=retry_after,
    )


_expected = lru_cache(256)(_made)  # under a flood, most answers are the same refusal


def _validation_problem(errors: Iterable[Any]) -> Problem:
    meant = [error for error in errors if not _of_other_kind(error)]
    found = [{"field": _field(error), "detail": _detail(error)} for error in meant]
    first = found[0]
    where = f"{first['field']}: " if first["field"] else ""
    return _made(
        PROBLEMS[RequestError],
        where + first["detail"],
        first["field"] or None,
        errors=found if len(found) > 1 else None,
    )


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
    if at_fault := error.get("ctx", {}).get("field"):  # a validator of several fields names the one to change
        location.append(at_fault)
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
    return _reason(details.type.rpartition(":")[2])


def _reason(name: str) -> str:
    return name.replace("-", "_")


# All that a service counts.
REASONS = sorted({_reason(kind.name) for kind in PROBLEMS.values() if kind.status in (*REJECTIONS, *BY_GUARD)})


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
