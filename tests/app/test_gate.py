"""The door: a full queue's refusals without the application, and what is left to it. One connection, no sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from app.gate import Door
from app.lifecycle import Service
from serving.errors import Overloaded
from tests.app.conftest import Start

BODY = b'{"history": ["i1"]}'
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
Exchange = Callable[..., list[Answer]]


class Wire(asyncio.Transport):
    """What a connection's other end would receive."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.9", 4711)})
        self.sent, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def answers(self) -> list[Answer]:
        """All of them so far."""
        found, left = [], self.sent
        while left:
            head, _, left = left.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            length = int(headers["content-length"])
            found.append((int(first.split()[1]), headers, left[:length]))
            left = left[length:]
        return found


def post(path: str = "/recommend", body: bytes = BODY, method: str = "POST", **headers: str) -> bytes:
    told = {"Host": "test", "Content-Type": "application/json", "Content-Length": str(len(body))}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


@pytest.fixture
def service(client: TestClient) -> Service:
    return client.app.state.service  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def full(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has been full for 2.3 s."""

    def check_room() -> None:
        raise Overloaded("in the application", 2.3)

    monkeypatch.setattr(service.batcher, "full_for", lambda: 2.3)
    monkeypatch.setattr(service.batcher, "check_room", check_room)


def talk(client: TestClient, *pieces: bytes, count: int = 1) -> list[Answer]:
    """Sends pieces of bytes over one connection and gives what came back, when all is answered."""

    async def go() -> list[Answer]:
        config = uvicorn.Config(client.app, http=Door, log_config=None, access_log=False)  # type: ignore[arg-type]
        config.load()
        door, wire = Door(config, ServerState(), {}, asyncio.get_running_loop()), Wire()
        door.connection_made(wire)
        for piece in pieces:
            door.data_received(piece)
        before = wire.answers()  # what is refused at the door is answered by now
        while len(wire.answers()) < count:
            await asyncio.sleep(0.001)
        for _, headers, _ in before:
            headers["at"] = "the door"
        assert wire.closed == any(headers.get("connection") == "close" for _, headers, _ in wire.answers())
        door.connection_lost(None)
        return before + wire.answers()[len(before) :]

    assert client.portal is not None
    return client.portal.call(asyncio.wait_for, go(), 10)  # type: ignore[no-any-return]


@pytest.fixture
def exchange(client: TestClient) -> Exchange:
    return partial(talk, client)


def test_a_full_queue_is_told_at_the_door(exchange: Exchange, client: TestClient, full: None) -> None:
    for path in ("/recommend", "/recommend?reasoning_steps=2"):
        ((status, headers, body),) = exchange(post(path, X_Request_ID="mine-7"))
        problem = json.loads(body)
        assert headers["at"] == "the door" and headers["x-request-id"] == "mine-7"
        assert (status, headers["retry-after"], problem["retry_after"]) == (503, "3", 3)
        assert problem["type"] == "urn:streamrec:problem:overloaded" and problem["status"] == 503
    told = client.get("/metrics").text
    assert 'streamrec_rejected_total{reason="overloaded"} 2.0' in told
    assert 'streamrec_request_seconds_count{route="/recommend",status="503"} 2.0' in told


def test_at_the_door_it_is_the_same_refusal_as_inside(exchange: Exchange, full: None) -> None:
    (door,) = exchange(post(X_Request_ID="mine"))
    (inside,) = exchange(post(X_Request_ID="mine", Origin="https://shop.example"))
    assert door[1].pop("at") == "the door" and "at" not in inside[1]
    assert door[0] == inside[0] == 503 and door[1].keys() == inside[1].keys()
    differ = {name for name in door[1] if door[1][name] != inside[1][name]}
    assert differ <= {"date", "content-length"}
    assert {**json.loads(door[2]), "detail": ""} == {**json.loads(inside[2]), "detail": ""}


def test_a_queue_with_room_leaves_everything_to_the_application(exchange: Exchange) -> None:
    ((status, headers, body),) = exchange(post())
    assert status == 200 and "at" not in headers and json.loads(body)["items"]


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
def test_what_is_not_plain_is_left_to_the_application(
    exchange: Exchange, full: None, request_: bytes, status: int
) -> None:
    (answer,) = exchange(request_)
    assert answer[0] == status and "at" not in answer[1]


def test_requests_in_pieces_and_one_after_another_keep_their_order(exchange: Exchange, full: None) -> None:
    whole = post(X_Request_ID="1") + post("/livez", b"", "GET", X_Request_ID="2") + post(X_Request_ID="3")
    answers = exchange(*(whole[place : place + 50] for place in range(0, len(whole), 50)), count=3)
    assert [(status, headers["x-request-id"]) for status, headers, _ in answers] == [(503, "1"), (200, "2"), (503, "3")]
    assert "at" in answers[0][1] and "at" not in answers[2][1]  # behind one that was still being answered


def test_a_connection_that_was_to_be_closed_is(exchange: Exchange, full: None) -> None:
    ((status, headers, _),) = exchange(post(Connection="close"))
    assert status == 503 and headers["connection"] == "close"


def test_a_service_that_drains_says_so_and_not_that_it_is_full(
    exchange: Exchange, full: None, service: Service
) -> None:
    service.begin_drain()
    ((status, headers, body),) = exchange(post())
    assert status == 503 and "at" not in headers and json.loads(body)["type"].endswith("draining")


@pytest.mark.parametrize("keys", [True, False])
def test_who_is_over_the_quota_is_told_at_the_door_until_there_is_room(
    start: Start, keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"api_keys": ",".join(hashlib.sha256(key.encode()).hexdigest() for key in ("one", "two"))} if keys else {}
    client = start(quota="2/minute", **known)
    monkeypatch.setattr(client.app.state.service.batcher, "full_for", lambda: 2.3)  # type: ignore[attr-defined]
    mine = post(X_API_Key="one")
    answers = [talk(client, mine)[0] for _ in range(4)]
    assert [status for status, _, _ in answers] == [503, 503, 429, 429]
    assert all("at" not in headers for _, headers, _ in answers[:2])  # where quotas are, a full queue is told inside
    counted, remembered = answers[2:]
    assert "at" not in counted[1] and remembered[1].pop("at") == "the door"
    assert counted[1].keys() == remembered[1].keys() and json.loads(counted[2]) == json.loads(remembered[2])
    assert 1 <= int(remembered[1]["retry-after"]) <= 60
    ((status, _, _),) = talk(client, post(X_API_Key="two"))
    assert status == (503 if keys else 429)  # without keys, an address has the quota
    assert "at" not in talk(client, post("/livez", b"", "GET"))[0][1]
    told = client.get("/metrics").text
    assert f'streamrec_rejected_total{{reason="over_quota"}} {2 if keys else 3}.0' in told
    quotas = client.app.state.quotas  # type: ignore[attr-defined]
    quotas._over = {client: (0.0, told) for client, (_, told) in quotas._over.items()}
    (later,) = talk(client, mine)
    assert later[0] == 429 and "at" not in later[1]  # counted anew


def test_behind_a_proxy_the_application_finds_out_who_asks(start: Start) -> None:
    client = start(quota="1/minute")
    for _ in range(3):
        ((status, headers, _),) = talk(client, post(X_Forwarded_For="192.0.2.1"))
        assert "at" not in headers
    assert status == 429
