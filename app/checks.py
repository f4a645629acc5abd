"""What is checked of a request before its body is read: its key and quota, the names in its query, its body's type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Coroutine, Iterable
from typing import Any, get_args, get_origin
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Depends, HTTPException, Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import QueryParams
from starlette.types import Scope

from app.body import too_large
from app.security import require_admin, require_key
from serving.errors import RequestError

SHOWN = 64  # characters of a name that the caller made up


class CheckedRoute(APIRoute):
    """A route that knows all parameters of its query, and reads a body only if it is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        parameters = get_flat_params(self.dependant)
        known = {field.alias for field in parameters if isinstance(field.field_info, params.Query)}
        lists = {field.alias for field in parameters if is_list(field.field_info.annotation)}

        async def checked(request: Request) -> Response:
            await self.check_caller(request)
            check_path(request.scope)
            check_query(request.scope["query_string"], known, lists)
            if self.body_field is not None:
                check_body(request.scope["headers"], request.app.state.service.settings.max_body_bytes)
            return await handle(request)

        return checked

    async def check_caller(self, request: Request) -> None:
        """Raises an error if the caller must not call."""


class KeyedRoute(CheckedRoute):
    """Checks key and quota first. FastAPI would parse the body before it looks at any dependency."""

    async def check_caller(self, request: Request) -> None:
        await require_key(request)


class RevalidatedRoute(KeyedRoute):
    """Its answers may be kept by those who ask, but not used again before the service has said that they still hold:
    with 304, to a request that has the answer's ETag as If-None-Match. What an operator takes away is gone at once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def revalidated(request: Request) -> Response:
            response = await handle(request)
            tag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
            headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
            if tag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            response.headers.update(headers)
            return response

        return revalidated


class AdminRoute(CheckedRoute):
    """Checks for an admin key, and the quota, first."""

    async def check_caller(self, request: Request) -> None:
        await require_admin(request)


def open_router(**options: Any) -> APIRouter:
    """Routes for everybody."""
    return APIRouter(route_class=CheckedRoute, **options)


# These two check nothing: they put both ways to send a key into the OpenAPI document.
DOCUMENTED = (Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False)))


def keyed_router(**options: Any) -> APIRouter:
    """Routes that take a key, where keys are configured."""
    return APIRouter(route_class=KeyedRoute, dependencies=DOCUMENTED, **options)


def revalidated_router(responses: dict[int | str, dict[str, Any]], **options: Any) -> APIRouter:
    """Routes that take a key, whose answers may be kept as long as they are asked for again."""
    kept: dict[int | str, dict[str, Any]] = {
        304: {"description": "still what has the ETag that was sent as If-None-Match"}
    }
    return APIRouter(route_class=RevalidatedRoute, dependencies=DOCUMENTED, responses=responses | kept, **options)


def admin_router(**options: Any) -> APIRouter:
    """Routes that change the service, for admin keys alone."""
    return APIRouter(route_class=AdminRoute, dependencies=DOCUMENTED, **options)


def check_path(scope: Scope) -> None:
    """Raises RequestError for an id that is not UTF-8. The server reads what is not as U+FFFD, and two users would be
    one."""
    if "\ufffd" in scope["path"] and not _is_utf8(scope.get("raw_path") or b"%ff"):  # few paths have a U+FFFD
        raise RequestError("The path is not UTF-8; encode ids as UTF-8 and each byte with %.", "path")


def _is_utf8(encoded: bytes) -> bool:
    try:
        unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        return False
    return True


def is_list(annotation: Any) -> bool:
    """Whether a parameter may be given several times. None may stand for one that is not given."""
    return any(get_origin(each) is list for each in (annotation, *get_args(annotation)))


def check_query(query: bytes, known: Iterable[str], lists: Container[str] = ()) -> None:
    """Raises RequestError for a query that is not UTF-8, and for a parameter that the route does not know, or that is
    given twice and is no list."""
    if not query:
        return
    if not _is_utf8(query):
        raise RequestError("The query is not UTF-8; encode text as UTF-8 and each byte with %.", "query")
    seen = set()
    for name, _ in QueryParams(query).multi_items():
        if name not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise RequestError(f"This route has no query parameter {name[:SHOWN]!r}; {takes}.", name[:SHOWN])
        if name in seen and name not in lists:
            raise RequestError(f"Give the query parameter {name} once.", name)
        seen.add(name)


def check_body(headers: Iterable[tuple[bytes, bytes]], most_bytes: int) -> None:
    """Raises an error unless the body is declared as JSON, uncompressed, and not as too large. A page of another origin
    can send other types without asking."""
    kind, encoding = b"", b"identity"
    for name, value in headers:  # raw, and once: this is done for every request
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding":
            encoding = value
        elif name == b"content-length" and value.isdigit() and int(value) > most_bytes:
            raise too_large(most_bytes)
    if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
        raise RequestError("Send JSON, with the header Content-Type: application/json.", "body")
    if encoding.strip().lower() != b"identity":
        raise HTTPException(
            415, "Send the body uncompressed, without Content-Encoding.", {"Accept-Encoding": "identity"}
        )
