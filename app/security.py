"""Who may call: API keys, of which the service knows only the sha256. Without any configured, everybody may call, by
the names that the service is known under."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from fastapi import Request
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.types import Scope

from app.errors import Forbidden, Unauthorised
from app.settings import Settings

MAX_ADDRESS = 64  # characters; none is longer
NOT_VALID = "This key is not valid; ask the operator for one."
NOT_ADMIN = "This needs an admin key, and the one sent is none; ask the operator."


# These are async because FastAPI would run plain functions in a thread, for every request.
async def require_key(request: Request) -> None:
    """Where keys are configured, raises Unauthorised without one and Forbidden with a wrong one. Then QuotaExceeded,
    which also answers those who keep sending wrong ones."""
    settings, quotas = request.app.state.service.settings, request.app.state.quotas
    client = client_of(request.scope, bool(settings.api_keys))
    if settings.api_keys:
        try:
            _require_one_of(client, [*settings.api_keys, *settings.admin_keys])
        except Forbidden:
            await quotas.take_guess(address_of(request.scope))
            raise
    request.state.client = client
    await quotas.take(client)


async def require_admin(request: Request) -> None:
    """For routes that change the service: what `require_key` raises, and Forbidden without an admin key. Where none is
    configured they are closed to everybody."""
    await require_key(request)
    settings, quotas = request.app.state.service.settings, request.app.state.quotas
    if not settings.admin_keys:
        raise Forbidden(
            "This needs an admin key and none is configured; set STREAMREC_ADMIN_KEYS to the sha256 of one."
        )
    digest = client_of(request.scope, keyed=True)
    try:
        _require_one_of(digest, settings.admin_keys, NOT_ADMIN)
    except Forbidden:
        if digest not in settings.api_keys:
            await quotas.take_guess(address_of(request.scope))
        raise


def client_of(scope: Scope, keyed: bool) -> str:
    """Who is calling, for quotas: the digest of the key that was sent, or its address where no keys are configured.
    Empty where that is not known."""
    if keyed:
        key = _sent_key(Headers(scope=scope))
        return hashlib.sha256(key.encode()).hexdigest() if key else ""
    return address_of(scope)


def address_of(scope: Scope) -> str:
    """The address a request came from, as quotas know it; see `_client_network`."""
    address = scope.get("client")
    return _client_network(address[0][:MAX_ADDRESS]) if address else ""


@lru_cache(4096)
def _client_network(address: str) -> str:
    """An IPv4 address as it is; of an IPv6 address the /64, all of which its holder may use. What is neither, such as
    what a proxy passed on unread, is one client."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return address
    return str(ip.ipv4_mapped or ipaddress.IPv6Address(int(ip) >> 64 << 64))


class Hosts:
    """Which names a request may ask for in `Host`. A page whose name is made to lead here (DNS rebinding) would pass
    for one of the service's own. It needs a name in the public DNS: an address is none, so that probes need no entry,
    and neither is one without a dot. An open service on a loopback address therefore answers to those alone."""

    def __init__(self, settings: Settings) -> None:
        self._names = frozenset(settings.allowed_hosts)
        self._any = "*" in self._names or not (self._names or (is_loopback(settings.host) and not settings.api_keys))
        self.permit = lru_cache(1024)(self._permit)

    def _permit(self, host: bytes) -> bool:
        if self._any or not host:  # HTTP/1.0 has none, and browsers always send it
            return True
        name = host.decode("latin-1").lower()
        if not name.endswith("]"):  # an IPv6 address without a port
            name = name.rpartition(":")[0] or name
        name = name.rstrip(".")
        if is_address(name.strip("[]")):
            return True
        return name in self._names if self._names else "." not in name or name.endswith(".localhost")


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _sent_key(headers: Headers) -> str:
    if key := headers.get("x-api-key"):
        return key
    scheme, credentials = get_authorization_scheme_param(headers.get("authorization"))
    return credentials if scheme.lower() == "bearer" else ""


def _require_one_of(digest: str, known: Iterable[str], otherwise: str = NOT_VALID) -> None:
    if not digest:
        raise Unauthorised("Send a key in the header X-API-Key, or as Authorization: Bearer.")
    # Every key is compared, in constant time, so that the time taken does not reveal which one came close.
    if not sum(hmac.compare_digest(digest, each) for each in known):
        raise Forbidden(otherwise)
