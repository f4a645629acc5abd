"""The load shedder: what it refuses, what it leaves to the application, and that a connection survives a refusal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from app.guard import Connections, Guard
from app.lifecycle import Service
from serving.errors import Overloaded
from serving.online.admission import QUEUE_FULL, Demand
from tests.app.conftest import Start, guard_bounds

BODY = b'{"history": ["i1"]}'
INSIDE = "refused inside"  # how the application words it
Answer = tuple[int, dict[str, str], dict[str, Any]]  # status, headers, body
Exchange = Callable[..., list[Answer]]


class Wire(asyncio.Transport):
    """What a connection's other end would receive."""

    def __init__(self, peer: str) -> None:
        super().__init__({"peername": (peer, 4711)})
        self.sent, self.closed, self.ended = b"", False, False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def answers(self) -> list[Answer]:
        """All answers so far."""
        found, left = [], self.sent
        while left:
            head, _, left = left.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            length = int(headers["content-length"])
            found.append((int(first.split()[1]), headers, json.loads(left[:length])))
            left = left[length:]
        return found


def post(path: str = "/recommend", body: bytes = BODY, method: str = "POST", **headers: str) -> bytes:
    sent = {"Host": "test", "Content-Type": "application/json", "Content-Length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


@pytest.fixture
def service(client: TestClient) -> Service:
    return client.app.state.service  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def full(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is full, and will be for 2.3 s."""
    fill(service, monkeypatch)


def fill(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the queue full, with one message for the load shedder and another for whoever asks further in."""

    def decide(demand: Demand | None = None, client: str = "") -> None:
        service.admission.check_open()
        caller = sys._getframe(1).f_globals["__name__"]
        raise Overloaded(QUEUE_FULL if caller == "app.load_shedder" else INSIDE, 2.3)

    monkeypatch.setattr(service.admission, "decide", decide)


def talk(
    client: TestClient,
    *pieces: bytes,
    count: int = 1,
    peer: str = "192.0.2.9",
    look: Callable[[Wire], None] = lambda wire: None,
) -> list[Answer]:
    """Sends pieces of bytes over one connection behind the guard, and returns the answers once there are `count`.
    `look` is called after every piece, once the application has done what it can."""

    async def go() -> list[Answer]:
        config = uvicorn.Config(
            client.app,  # type: ignore[arg-type]
            http=partial(Guard, Connections(guard_bounds())),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        config.load()
        protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
        wire = Wire(peer)
        protocol.connection_made(wire)
        for piece in pieces:
            protocol.data_received(piece)  # type: ignore[attr-defined]
            for _ in range(5):
                await asyncio.sleep(0)
            look(wire)
        while len(wire.answers()) < count:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        assert (wire.closed or wire.ended) == any(
            headers.get("connection") == "close" for _, headers, _ in wire.answers()
        )
        protocol.connection_lost(None)
        return wire.answers()

    assert client.portal is not None
    return client.portal.call(asyncio.wait_for, go(), 10)  # type: ignore[no-any-return]


@pytest.fixture
def exchange(client: TestClient) -> Exchange:
    return partial(talk, client)


def test_a_full_queue_is_refused_at_the_gate(exchange: Exchange, client: TestClient, full: None) -> None:
    for path in ("/recommend", "/recommend?reasoning_steps=2"):
        ((status, headers, problem),) = exchange(post(path, X_Request_ID="mine-7"))
        assert problem["detail"] != INSIDE and headers["x-request-id"] == "mine-7"
        assert (status, headers["retry-after"], problem["retry_after"]) == (503, "3", 3)
        assert problem["type"] == "urn:streamrec:problem:overloaded" and problem["status"] == 503
    metrics = client.get("/metrics").text
    assert 'streamrec_rejected_total{reason="overloaded"} 2.0' in metrics
    assert 'streamrec_request_seconds_count{route="/recommend",status="503"} 2.0' in metrics


def test_the_gate_refuses_as_the_application_does(exchange: Exchange, full: None) -> None:
    (gate,) = exchange(post(X_Request_ID="mine"))
    (inside,) = exchange(post(X_Request_ID="mine", Origin="https://shop.example"))
    assert gate[2]["detail"] != INSIDE == inside[2]["detail"]
    assert gate[0] == inside[0] == 503 and gate[1].keys() == inside[1].keys()
    assert {name for name in gate[1] if gate[1][name] != inside[1][name]} <= {"date", "content-length"}
    assert {**gate[2], "detail": ""} == {**inside[2], "detail": ""}


def test_the_gate_marks_what_came_over_tls(client: TestClient, full: None) -> None:
    refused = client.post("https://testserver/recommend", content=BODY)
    assert refused.status_code == 503 and refused.headers["strict-transport-security"].startswith("max-age=")


def test_a_queue_with_room_leaves_everything_to_the_application(exchange: Exchange) -> None:
    ((status, _, answer),) = exchange(post())
    assert status == 200 and answer["items"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/recommend/batch", b'{"requests": []}'), 422),
        (post("/models", b"", "GET"), 200),
        (post(method="GET", body=b""), 405),
        (post(Origin="https://shop.example"), 503),
        (post(body=b" " * (1 << 20) + b" "), 413),
    ],
    ids=["another route", "another page", "another method", "a page of another origin", "too large"],
)  # fmt: skip
def test_the_rest_is_left_to_the_application(exchange: Exchange, full: None, request_: bytes, status: int) -> None:
    ((found, _, answer),) = exchange(request_)
    assert found == status and (status != 503 or answer["detail"] == INSIDE)


def test_pipelined_requests_in_pieces_are_answered_in_order(exchange: Exchange, full: None) -> None:
    whole = post(X_Request_ID="1") + post("/livez", b"", "GET", X_Request_ID="2") + post(X_Request_ID="3")
    answers = exchange(*(whole[start : start + 50] for start in range(0, len(whole), 50)), count=3)
    assert [(status, headers["x-request-id"]) for status, headers, _ in answers] == [(503, "1"), (200, "2"), (503, "3")]


def test_a_refusal_does_not_wait_for_the_body_and_the_connection_ends_after_it(exchange: Exchange, full: None) -> None:
    """Closed earlier, it would be reset under a client that still sends, and the answer lost."""
    large = post(body=b" " * 300_000, Connection="close")  # more than uvicorn buffers
    pieces = [large[start : start + 65_536] for start in range(0, len(large), 65_536)]
    answers, closed_after = [], []

    def look(wire: Wire) -> None:
        answers.append(len(wire.answers()))
        closed_after.append(wire.closed)

    ((status, headers, _),) = exchange(*pieces, look=look)
    assert status == 503 and headers["connection"] == "close"
    assert answers[:-1] == [1] * (len(pieces) - 1) and not any(closed_after[:-1])


def test_a_kept_connection_is_good_for_another_request_after_a_refused_body(exchange: Exchange, full: None) -> None:
    large = post(body=b" " * 300_000)
    answers = exchange(*(large[start : start + 65_536] for start in range(0, len(large), 65_536)), post(), count=2)
    assert [status for status, _, _ in answers] == [503, 503]


def test_a_connection_that_was_to_be_closed_is(exchange: Exchange, full: None) -> None:
    ((status, headers, _),) = exchange(post(Connection="close"))
    assert status == 503 and headers["connection"] == "close"


def test_a_service_that_drains_says_so_and_not_that_it_is_full(
    exchange: Exchange, full: None, service: Service
) -> None:
    service.begin_drain()
    ((status, _, problem),) = exchange(post())
    assert status == 503 and problem["type"].endswith("draining")


@pytest.mark.parametrize("keys", [True, False])
def test_a_client_over_its_quota_is_refused_at_the_gate_until_there_is_room(
    start: Start, keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"api_keys": ",".join(hashlib.sha256(key.encode()).hexdigest() for key in ("one", "two"))} if keys else {}
    client = start(quota="2/minute", **known)
    quotas, counted = client.app.state.quotas, []  # type: ignore[attr-defined]
    take = quotas.take

    async def counting(name: str, cost: int = 1) -> None:
        counted.append(name)
        await take(name, cost)

    monkeypatch.setattr(quotas, "take", counting)
    fill(client.app.state.service, monkeypatch)  # type: ignore[attr-defined]
    mine = post(X_API_Key="one")
    answers = [talk(client, mine)[0] for _ in range(4)]
    # With a quota, a full queue is refused inside, after counting; so is the first request over the quota.
    assert [status for status, _, _ in answers] == [503, 503, 429, 429] and len(counted) == 3
    inside, gate = answers[2:]
    assert inside[1].keys() == gate[1].keys() and inside[2] == gate[2]
    assert 1 <= int(gate[1]["retry-after"]) <= 60
    if keys:  # in either header
        assert talk(client, post(Authorization="Bearer one"))[0][0] == 429 and len(counted) == 3
    ((status, _, _),) = talk(client, post(X_API_Key="two"))
    assert status == (503 if keys else 429)  # without keys, the quota is the address's
    assert talk(client, post("/livez", b"", "GET"))[0][0] == 200
    assert 'streamrec_rejected_total{reason="over_quota"} 3.0' in client.get("/metrics").text
    quotas._over = {name: (0.0, message) for name, (_, message) in quotas._over.items()}
    before = len(counted)
    assert talk(client, mine)[0][0] == 429 and len(counted) == before + 1  # counted again once its time has come


def status_of(client: TestClient, peer: str, forwarded_for: str = "") -> int:
    sent = {"X_Forwarded_For": forwarded_for} if forwarded_for else {}
    ((status, _, _),) = talk(client, post(**sent), peer=peer)
    return status


def test_a_trusted_proxy_names_the_client_that_a_quota_is_for(start: Start) -> None:
    client = start(quota="1/minute", trusted_proxies="10.0.0.0/8, fd00::7")
    assert [status_of(client, "10.0.0.1", "192.0.2.1") for _ in range(2)] == [200, 429]
    assert status_of(client, "fd00::7", "192.0.2.2") == 200
    assert status_of(client, "10.0.0.9", "203.0.113.9, 192.0.2.2, 10.0.0.1") == 429, "the last that is no proxy counts"
    assert [status_of(client, "198.51.100.7", f"192.0.2.{n}") for n in (3, 4)] == [200, 429], "not trusted"
    assert [status_of(client, "10.0.0.1", f"{junk}") for junk in ("junk", "more junk", "x" * 5000)] == [200, 429, 429]


def test_no_proxy_is_trusted_unless_it_is_named(start: Start) -> None:
    client = start(quota="1/minute")
    assert [status_of(client, "127.0.0.1", f"192.0.2.{n}") for n in (1, 2)] == [200, 429]


def test_all_addresses_of_a_64_are_one_client(start: Start) -> None:
    client = start(quota="1/minute")
    assert [status_of(client, f"2001:db8:0:1::{n:x}") for n in (1, 0xFFFF)] == [200, 429]
    assert status_of(client, "2001:db8:0:2::1") == 200
    assert [status_of(client, peer) for peer in ("192.0.2.1", "::ffff:192.0.2.1")] == [200, 429]
