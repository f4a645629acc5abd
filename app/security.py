"""Who may call: API keys, of which the service knows only the sha256. Without any configured, everybody may call."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.types import Scope

from app.errors import Forbidden, Unauthorised


# These are async because FastAPI would run plain functions in a thread, for every request.
async def require_key(request: Request) -> None:
    """Where keys are configured, raises Unauthorised without one and Forbidden with a wrong one. Then QuotaExceeded."""
    settings = request.app.state.service.settings
    client = client_of(request.scope, bool(settings.api_keys))
    if settings.api_keys:
        _require_one_of(client, [*settings.api_keys, *settings.admin_keys])
    request.state.client = client
    await request.app.state.quotas.take(client)


async def require_admin(request: Request) -> None:
    """For routes that change the service: closed to all but admin keys, and to everybody where none is configured."""
    _require_one_of(client_of(request.scope, keyed=True), request.app.state.service.settings.admin_keys)


# The first two check nothing: they put both ways to send a key into the OpenAPI document.
KEY_REQUIRED = [
    Depends(APIKeyHeader(name="X-API-Key", auto_error=False)),
    Depends(HTTPBearer(auto_error=False)),
    Depends(require_key),
]


def client_of(scope: Scope, keyed: bool) -> str:
    """Who is calling, for quotas: the digest of the key that was sent, or its address where no keys are configured.
    Empty where that is not known."""
    if keyed:
        key = _sent_key(Headers(scope=scope))
        return hashlib.sha256(key.encode()).hexdigest() if key else ""
    address = scope.get("client")
    return address[0] if address else ""


def _sent_key(headers: Headers) -> str:
    if key := headers.get("x-api-key"):
        return key
    scheme, credentials = get_authorization_scheme_param(headers.get("authorization"))
    return credentials if scheme.lower() == "bearer" else ""


def _require_one_of(digest: str, known: Iterable[str]) -> None:
    if not digest:
        raise Unauthorised("Send a key in the header X-API-Key, or as Authorization: Bearer.")
    # Every key is compared, in constant time, so that the time taken does not reveal which one came close.
    if not sum(hmac.compare_digest(digest, each) for each in known):
        raise Forbidden("This key is not valid; ask the operator for one.")
