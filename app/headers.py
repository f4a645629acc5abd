"""The headers that every answer has, and the id that a request is known by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from starlette.types import Scope

from app.ids import fresh_id

Raw = tuple[bytes, bytes]

REQUEST_ID = re.compile(
    r"[!#-\[\]-~]{1,128}"
)  # visible ASCII, but for what JSON escapes: a log line is searched for it
ID_FIELD = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)
SNIFFING: Raw = (b"x-content-type-options", b"nosniff")
PAGE: list[Raw] = [
    # Everything a page needs comes from the service itself: no inline code, no other host.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    SNIFFING,
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
# Browsers heed the rest in pages alone, and every header takes time to send.
DATA: list[Raw] = [(b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"), SNIFFING]
NO_STORE: Raw = (b"cache-control", b"no-store")
REFUSED = "refused"  # in a scope's state: the status that the guard has answered with, ahead of the application
HTTPS_ONLY: Raw = (b"strict-transport-security", b"max-age=31536000")


def request_id(headers: Iterable[Raw]) -> str:
    """The caller's own id where it sent one that is safe to log and to send back, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(sent := value.decode("latin-1")):
            return sent
    return fresh_id()


def id_in(head: bytes) -> str:
    """The same, for a head that is refused and so never parsed."""
    return request_id((b"x-request-id", found[1]) for found in ID_FIELD.finditer(head))


def id_of(scope: Scope) -> str:
    """The id of a request, the same for all who answer or log it."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        state["request_id"] = request_id(scope["headers"])
    return str(state["request_id"])


def with_standard_headers(own: Sequence[Raw], request_id: str, scheme: str) -> list[Raw]:
    """An answer's own headers, and those that every page, or every other answer, has."""
    known = dict(own)
    is_page = known.get(b"content-type", b"").startswith(b"text/html")
    headers = [*own, (b"x-request-id", request_id.encode()), *(PAGE if is_page else DATA)]
    if NO_STORE[0] not in known:
        headers.append(NO_STORE)
    if scheme == "https":
        headers.append(HTTPS_ONLY)
    return headers
