"""When a call of the client is sent again, when it ends, and with which error; both kinds of client."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from streamrec import transport
from streamrec.client import AsyncClient, Client, NotFound, ServiceError, Unavailable

Outcome = httpx.Response | httpx.TransportError


class Blocking:
    """An AsyncClient whose calls block."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made = getattr(self._client, name)(*arguments, **options)
            return self._loop.run_until_complete(made if inspect.isawaitable(made) else _all(made))

        return call

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.close()


async def _all(generator: Any) -> list[Any]:
    return [each async for each in generator]


class Service:
    """Gives one prepared outcome after the other, and keeps the requests and the pauses between them."""

    def __init__(self, kind: type[Client] | type[Blocking], monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.pauses, self.requests = kind, list[float](), list[httpx.Request]()

        async def pause(seconds: float) -> None:
            self.pauses.append(seconds)

        monkeypatch.setattr(transport.time, "sleep", self.pauses.append)
        monkeypatch.setattr(transport.asyncio, "sleep", pause)

    def client(self, *outcomes: Outcome, **options: Any) -> Any:
        left = iter(outcomes)

        def answer(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            outcome = next(left)
            if isinstance(outcome, httpx.TransportError):
                raise outcome
            return outcome

        return self.kind("http://shop.test", transport=httpx.MockTransport(answer), **options)


@pytest.fixture(params=[Client, Blocking])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(request.param, monkeypatch)


def refusal(status: int, name: str = "overloaded", wait: int | None = 1, **more: object) -> httpx.Response:
    problem = {"type": f"urn:streamrec:problem:{name}", "title": "No", "status": status, "detail": "Not now.", **more}
    headers = {"Content-Type": "application/problem+json", "X-Request-ID": "r-1"}
    return httpx.Response(status, json=problem, headers=headers | ({} if wait is None else {"Retry-After": str(wait)}))


def done() -> httpx.Response:
    return httpx.Response(200, json={"items": []})


def test_a_refusal_is_repeated_after_the_time_that_it_names(service: Service) -> None:
    client = service.client(refusal(503, wait=2), refusal(429, "over-quota", wait=3), done())
    assert client.recommend(history=["i1"]) == {"items": []}
    first, second = service.pauses
    assert 2 <= first <= 2.4 and 3 <= second <= 3.6
    assert len({request.content for request in service.requests}) == 1


def test_the_last_refusal_is_raised_with_all_that_it_says(service: Service) -> None:
    with pytest.raises(Unavailable, match="Not now") as error:
        service.client(refusal(503), refusal(503), retries=1).recommend()
    assert error.value.status == 503 and error.value.request_id == "r-1" and error.value.retry_after == 1
    assert error.value.problem["title"] == "No" and len(service.requests) == 2


def test_a_wait_that_does_not_fit_the_time_ends_the_call_at_once(service: Service) -> None:
    with pytest.raises(Unavailable):
        service.client(refusal(503, wait=5), timeout=2.0).recommend()
    assert service.pauses == [] and len(service.requests) == 1


def test_what_is_too_late_or_wrong_is_not_repeated(service: Service) -> None:
    for answer, kind in [
        (refusal(504, "deadline-exceeded", wait=None), Unavailable),
        (refusal(422, "invalid-request", wait=None, field="k"), ServiceError),
        (refusal(404, "not-found", wait=None), NotFound),
    ]:
        with pytest.raises(ServiceError) as error:
            service.client(answer, done()).recommend()
        assert type(error.value) is kind and error.value.status == answer.status_code
    assert len(service.requests) == 3


def test_events_that_may_have_been_stored_are_not_sent_twice(service: Service) -> None:
    doubtful = [refusal(503, "store-unavailable"), httpx.ReadError("cut"), httpx.ReadTimeout("late")]
    for outcome in doubtful:
        with pytest.raises(Unavailable):
            service.client(outcome, done()).append_events("ann", items=["i1"])
    assert len(service.requests) == len(doubtful)
    for outcome in [refusal(503, "draining"), refusal(429, "over-quota"), httpx.ConnectError("nobody")]:
        assert service.client(outcome, done()).append_events("ann", items=["i1"]) == {"items": []}
    for outcome in doubtful:  # counted once however often it is sent
        assert service.client(outcome, done()).give_feedback(recommendation_id="r", item_id="i1", event="click")


def test_pauses_grow_while_nobody_is_there(service: Service) -> None:
    nobody = [httpx.ConnectError("nobody")] * 4
    with pytest.raises(Unavailable, match="cannot be reached") as error:
        service.client(*nobody, retries=3).recommend()
    assert error.value.status is None and error.value.problem is None
    assert [round(pause, 1) for pause in service.pauses] == pytest.approx([0.1, 0.2, 0.4], rel=0.25)


def test_what_a_proxy_says_is_an_error_too(service: Service) -> None:
    with pytest.raises(Unavailable, match="502 Bad Gateway"):
        service.client(httpx.Response(502, html="<h1>nginx</h1>")).recommend()


def test_ids_are_one_part_of_the_path_and_what_is_not_given_is_not_sent(service: Service) -> None:
    client = service.client(done(), done(), httpx.Response(204), key="sesame")
    client.similar_items("a/../b?ü", k=3, deny=["i1", "i2"])
    client.read_user("..")
    assert client.erase_user("ann") is None
    first, second, _ = service.requests
    assert first.url.raw_path == b"/items/a%2F%2E%2E%2Fb%3F%C3%BC/similar?k=3&deny=i1&deny=i2"
    assert second.url.raw_path == b"/users/%2E%2E" and second.headers["X-API-Key"] == "sesame"


def test_many_requests_are_sent_in_parts_and_answered_in_order(service: Service) -> None:
    answers = [httpx.Response(200, json={"results": [{"user_id": str(n)} for n in part]}) for part in ((0, 1), (2,))]
    requests = ({"user_id": str(number)} for number in range(3))
    found = list(service.client(*answers).recommend_many(requests, reasoning_steps="auto", batch=2))
    assert [each["user_id"] for each in found] == ["0", "1", "2"]
    assert [request.url.query for request in service.requests] == [b"reasoning_steps=auto"] * 2


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_a_service_that_says_nothing_ends_the_call_within_its_time(
    kind: type[Client] | type[Blocking], silent: str
) -> None:
    with kind(silent, timeout=0.2) as client, pytest.raises(Unavailable, match="ReadTimeout"):
        client.list_models()
