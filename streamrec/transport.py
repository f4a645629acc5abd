"""How a client's calls travel: with a key, within a time, repeated where that helps, and with errors as exceptions.

ServiceError        the service did not do it; `problem` says why
  Unavailable       not now: over a quota, overloaded, too late, or not reachable
  NotFound          there is no such user, item, catalogue or model
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any, Self, cast
from urllib.parse import quote

import httpx

from streamrec.models import Problem

PAUSE = (
    0.1  # seconds before the first repetition of a call that did not reach the service; doubled for each further one
)
JITTER = 0.2  # share by which a wait is lengthened at most, so that clients refused together do not return together
UNAVAILABLE = {429, 502, 503, 504}
# A store that failed may have stored all the same; every other 429 and 503 comes before anything is done.
PERHAPS_DONE = "urn:streamrec:problem:store-unavailable"


class ServiceError(Exception):
    """The service did not do what it was asked for. status, problem: None where no answer came. request_id: by which
    its log has the request."""

    def __init__(
        self, message: str, *, problem: Problem | None = None, request_id: str | None = None,
        retry_after: float | None = None, is_undone: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.problem, self.request_id = problem, request_id
        self.retry_after, self.is_undone = retry_after, is_undone  # seconds; whether surely nothing was done
        self.status = problem and problem["status"]


class Unavailable(ServiceError):
    """No answer now. retry_after: seconds after which another try makes sense, None if none does."""


class NotFound(ServiceError):
    """There is no such user, item, catalogue or model."""


def segment(text: str) -> str:
    """An id as one part of a path, dots too: `..` is a path of its own."""
    return quote(text, safe="").replace(".", "%2E")


class _Call:
    """One call: its request, the time and the repetitions that it has left.

    is_repeatable: sent twice it does no more than once."""

    def __init__(
        self, timeout: float, retries: int, method: str, path: str, *,
        query: Mapping[str, Any] | None = None, body: object = None, is_repeatable: bool = False,
    ) -> None:  # fmt: skip
        self._end, self._left, self._is_repeatable = time.monotonic() + timeout, retries, is_repeatable
        self._pause = PAUSE
        given = {name: value for name, value in (query or {}).items() if value is not None}
        self._request: dict[str, Any] = {"method": method, "url": path, "params": given, "json": body}

    def request(self) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        return {**self._request, "timeout": max(0.001, self._end - time.monotonic())}

    def unreached(self, error: httpx.TransportError) -> ServiceError:
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        pause, self._pause = self._pause, 2 * self._pause
        return Unavailable(f"The service cannot be reached: {error!r}.", retry_after=pause, is_undone=never_sent)

    def pause_after(self, failure: ServiceError) -> float:
        """Seconds to wait before the next attempt. Raises the failure if there is none."""
        wait = None if failure.retry_after is None else failure.retry_after * random.uniform(1, 1 + JITTER)
        may_repeat = self._left > 0 and (self._is_repeatable or failure.is_undone)
        if wait is None or not may_repeat or time.monotonic() + wait >= self._end:
            raise failure
        self._left -= 1
        return wait


def _failure(response: httpx.Response) -> ServiceError:
    """What an answer that is no success says."""
    if response.headers.get("Content-Type") == "application/problem+json":
        problem = cast(Problem, response.json())
    else:  # of a proxy
        problem = Problem(type="about:blank", title=response.reason_phrase, status=response.status_code, detail="")
    wait = response.headers.get("Retry-After", "")
    status = response.status_code
    kind = Unavailable if status in UNAVAILABLE else NotFound if status == 404 else ServiceError
    return kind(
        problem["detail"] or f"{status} {problem['title']}",
        problem=problem,
        request_id=response.headers.get("X-Request-ID"),
        retry_after=float(wait) if wait.isdigit() else None,
        is_undone=status in (429, 503) and problem["type"] != PERHAPS_DONE,
    )


def _answer(response: httpx.Response) -> Any:
    return response.json() if response.content else None


class _Settings:
    """address: of the service. key: if it asks for one. timeout: seconds that a call takes at most, repetitions and the
    waits before them included; a wait that does not fit ends the call at once. retries: how often a call is repeated
    at most. options: of httpx, such as `verify`, `proxy` or `headers`."""

    def __init__(
        self, address: str, *, key: str | None = None, timeout: float = 10.0, retries: int = 2, **options: Any
    ) -> None:
        self._timeout, self._retries = timeout, retries
        self._options = {"base_url": address, **options}
        if key is not None:
            self._options["headers"] = {**options.get("headers", {}), "X-API-Key": key}


class Transport(_Settings):
    """Sends, waits and sends again; safe to share between threads."""

    def __init__(self, address: str, **settings: Any) -> None:
        super().__init__(address, **settings)
        self._http = httpx.Client(**self._options)

    def _call(self, method: str, path: str, **what: Any) -> Any:
        call = _Call(self._timeout, self._retries, method, path, **what)
        while True:
            try:
                response = self._http.request(**call.request())
                if response.is_success:
                    return _answer(response)
                failure = _failure(response)
            except httpx.TransportError as error:
                failure = call.unreached(error)
            time.sleep(call.pause_after(failure))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncTransport(_Settings):
    """The same, awaited."""

    def __init__(self, address: str, **settings: Any) -> None:
        super().__init__(address, **settings)
        self._http = httpx.AsyncClient(**self._options)

    async def _call(self, method: str, path: str, **what: Any) -> Any:
        call = _Call(self._timeout, self._retries, method, path, **what)
        while True:
            try:
                response = await self._http.request(**call.request())
                if response.is_success:
                    return _answer(response)
                failure = _failure(response)
            except httpx.TransportError as error:
                failure = call.unreached(error)
            await asyncio.sleep(call.pause_after(failure))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
