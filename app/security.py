"""Who may call: API keys, of which the service knows the sha256 only. Without any configured, everybody may call."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Forbidden, Unauthorised

header = APIKeyHeader(name="X-API-Key", auto_error=False)
bearer = HTTPBearer(auto_error=False)

Header = Annotated[str | None, Depends(header)]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


# Both are async because FastAPI would send plain functions to a thread, at every request.
async def require_key(request: Request, key: Header, credentials: Bearer) -> None:
    """Where keys are configured, raises Unauthorised without one and Forbidden with a wrong one. Then QuotaExceeded."""
    settings = request.app.state.service.settings
    address = request.client
    client = address.host if address else ""
    if settings.api_keys:
        client = _digest(key, credentials)
        if not _is_one_of(client, [*settings.api_keys, *settings.admin_keys]):
            raise Forbidden("This key is not valid; ask the operator for one.")
    request.state.client = client
    await request.app.state.quotas.take(client)


async def require_admin(request: Request, key: Header, credentials: Bearer) -> None:
    """For routes that change the service: closed to all but admin keys, and to everybody where none is configured."""
    if not _is_one_of(_digest(key, credentials), request.app.state.service.settings.admin_keys):
        raise Forbidden("This needs an admin key; ask the operator for one.")


def _digest(key: str | None, credentials: HTTPAuthorizationCredentials | None) -> str:
    sent = key or (credentials.credentials if credentials else None)
    if not sent:
        raise Unauthorised("Send a key in the header X-API-Key, or as Authorization: Bearer.")
    return hashlib.sha256(sent.encode()).hexdigest()


def _is_one_of(digest: str, known: Iterable[str]) -> bool:
    # Every key is compared, in constant time, so that the time taken tells nothing of which one came close.
    return sum(hmac.compare_digest(digest, each) for each in known) > 0
