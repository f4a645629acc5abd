"""API keys: the service knows their sha256 only. Without any configured, everybody may call."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Forbidden, Unauthorised

header = APIKeyHeader(name="X-API-Key", auto_error=False)
bearer = HTTPBearer(auto_error=False)


async def require_key(  # async: FastAPI would send a plain function to a thread, at every request
    request: Request,
    key: Annotated[str | None, Depends(header)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    """Raises Unauthorised without a key and Forbidden with a wrong one, where keys are configured."""
    accepted = request.app.state.service.settings.api_keys
    if not accepted:
        return
    sent = key or (credentials.credentials if credentials else None)
    if not sent:
        raise Unauthorised("Send a key in the header X-API-Key, or as Authorization: Bearer.")
    digest = hashlib.sha256(sent.encode()).hexdigest()
    # Every key is compared, so that the time taken tells nothing of which one came close.
    if sum(hmac.compare_digest(digest, known) for known in accepted) == 0:
        raise Forbidden("This key is not valid; ask the operator for one.")
