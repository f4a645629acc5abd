"""The guard before a toy application, on sockets of this process: what it bounds, refuses and lets go."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from app import guard
from app.guard import Connections, Guard
from app.headers import REFUSED
from tests.app.conftest import guard_bounds
from tests.waiting import DEADLINE, eventually_async

POST = b"POST /here HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /here HTTP/1.1\r\nHost: x\r\n\r\n"


class Toy:
    """Answers with what it was asked, or what the path says. `hold` keeps /held unanswered; `gone` counts clients that
    left before their body was complete."""

    def __init__(self) -> None:
        self.hold, self.gone, self.begun, self.bodies = asyncio.Event(), 0, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body, more = body + message.get("body", b""), message["more_body"]
        self.bodies += 1
        if scope["path"] == "/held":
            await self.hold.wait()
        told = {
            "path": scope["path"],
            "body": body.decode("latin-1"),
            "headers": [n.decode() for n, _ in scope["headers"]],
        }
        answer = b"a" * (32 << 20) if scope["path"] == "/large" else json.dumps(told).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send(
            {"type": "http.response.start", "status": 413 if scope["path"] == "/early" else 200, "headers": headers}
        )
        if scope["path"] == "/broken":
            raise RuntimeError("the answer has a head and no body")
        if scope["path"] == "/pieces":
            await send({"type": "http.response.body", "body": answer[:9], "more_body": True})
            answer = answer[9:]
        await send({"type": "http.response.body", "body": answer})


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), DEADLINE)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), DEADLINE)).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), DEADLINE)
        return int(status.split()[1]), headers, json.loads(body) if body[:1] == b"{" else body

    async def is_closed(self) -> bool:
        """Whether nothing more comes, and no reset."""
        return await asyncio.wait_for(self.reader.read(), DEADLINE) == b""

    async def refused(self, status: int, name: str) -> None:
        """The last answer on this connection is this problem."""
        found, headers, problem = await self.answer()
        assert (found, headers["connection"]) == (status, "close") and headers["x-request-id"]
        assert headers["content-type"] == "application/problem+json"
        assert problem["status"] == status and problem["type"] == f"urn:streamrec:problem:{name}"
        assert await self.is_closed()


class Served:
    def __init__(self, connections: Connections, toy: Toy, port: int) -> None:
        self.connections, self.toy, self.port, self.clients = connections, toy, port, list[Client]()

    async def connect(self, sent: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))
        self.clients.append(client)
        if sent:
            await client.send(sent)
        return client

    def pass_time(self, seconds: float) -> None:
        self.connections.sweep(asyncio.get_running_loop().time() + seconds)


@asynccontextmanager
async def serving(**bounds: float) -> AsyncIterator[tuple[Served, Counter[str]]]:
    toy, refused = Toy(), Counter[str]()
    connections = Connections(guard_bounds(**bounds), lambda reason: refused.update([reason]))
    config = uvicorn.Config(toy, log_config=None, access_log=False, lifespan="off", ws="none")
    config.load()
    loop = asyncio.get_running_loop()
    make = partial(Guard, connections, config=config, server_state=ServerState(), app_state={}, _loop=loop)
    server = await loop.create_server(make, "127.0.0.1", 0)
    served = Served(connections, toy, server.sockets[0].getsockname()[1])
    try:
        yield served, refused
    finally:
        toy.hold.set()
        server.close()
        for client in served.clients:
            client.writer.transport.abort()
        await eventually_async(lambda: not connections.all)
        left = (connections.unfinished_bytes, connections.idle, connections.unfinished, connections.given_up)
        assert left == (0, {}, {}, set()), "something stayed behind"


Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    """Runs an async test, keeping its name and parameters."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), DEADLINE))

    return run


# Requests that are fine


@in_loop
async def test_requests_in_any_pieces_are_answered_in_order_on_one_connection() -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n1\r\nt\r\n2;ext=1\r\nwo\r\n0\r\nX-Trailer: 1\r\n\r\n"
    stream = (
        POST + b"Content-Length: 3\r\n\r\none" + POST.replace(b"here", b"two") + chunked
        + b"\r\n" + GET + POST + b"Content-Length: 4\r\n\r\nfour"
    )  # fmt: skip
    async with serving() as (served, refused):
        for size in (1, 7, 50, len(stream)):
            client = await served.connect()
            for at in range(0, len(stream), size):
                await client.send(stream[at : at + size])
                await asyncio.sleep(0)
            answers = [await client.answer() for _ in range(4)]
            assert [status for status, _, _ in answers] == [200] * 4
            assert [told["body"] for _, _, told in answers] == ["one", "two", "", "four"]
            assert answers[1][2]["path"] == "/two" and "x-trailer" not in answers[1][2]["headers"]
    assert not refused


@pytest.mark.parametrize(
    "request_line, writes",
    [("GET /here", [(True, True)]), ("GET /pieces", [(True, False), (False, True)]),
     ("HEAD /here", [(True, False)]), ("GET /broken", [(True, False)])],
)  # fmt: skip
@in_loop
async def test_a_head_is_written_with_the_first_of_its_body_or_alone_if_there_is_none(
    request_line: str, writes: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """writes: whether each begins with a head, and ends with the end of a body."""
    written: list[bytes] = []

    class Recorded(guard._Transport):
        def __init__(self, socket: asyncio.Transport, own: Guard) -> None:
            def write(data: bytes) -> None:
                written.append(data)
                socket.write(data)

            super().__init__(Mock(wraps=socket, write=write), own)

    monkeypatch.setattr(guard, "_Transport", Recorded)
    async with serving() as (served, _):
        client = await served.connect(f"{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = await asyncio.wait_for(client.reader.read(), DEADLINE)
    assert [(data.startswith(b"HTTP/1.1 200"), data.endswith(b"}")) for data in written] == writes
    assert b"".join(written) == received


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"WebSocket, h2c"])
@pytest.mark.parametrize("body", ["length", "chunked"])
@pytest.mark.parametrize("apart", [False, True])
@in_loop
async def test_an_offer_to_upgrade_is_ignored_and_its_body_is_no_request(offer: bytes, body: str, apart: bool) -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = hidden if body == "length" else b"%x\r\n%s\r\n0\r\n\r\n" % (len(hidden), hidden)
    framing = b"Content-Length: %d" % len(hidden) if body == "length" else b"Transfer-Encoding: chunked"
    head = (
        POST
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: "
        + offer
        + b"\r\nHTTP2-Settings: AAM\r\n"
        + framing
        + b"\r\n\r\n"
    )
    async with serving() as (served, _):
        client = await served.connect(head if apart else head + sent + GET)
        if apart:
            await eventually_async(lambda: served.toy.begun == 1)
            await client.send(sent + GET)
        first, second = await client.answer(), await client.answer()
        assert (first[0], first[2]["path"], first[2]["body"]) == (200, "/here", hidden.decode())
        assert (second[0], second[2]["path"], second[2]["body"]) == (200, "/here", "")
        assert served.toy.begun == 2


@in_loop
async def test_requests_sent_ahead_wait_and_are_bounded() -> None:
    async with serving(head_bytes=1000) as (served, _):
        held = GET.replace(b"here", b"held")
        client = await served.connect(held)
        await eventually_async(lambda: served.toy.begun == 1)
        await client.send(GET * 200)
        (connection,) = served.connections.all
        await eventually_async(lambda: connection.flow.read_paused)
        assert served.toy.begun == 1
        served.toy.hold.set()
        assert [(await client.answer())[0] for _ in range(201)] == [200] * 201


# Bounds of one request


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 5000,
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        GET[:-2] + b"X-Big: " + b"a" * 5000,
        GET[:-2] + b"X-Big: " + b"a" * 5000 + b"\r\n\r\n",
        GET[:-2] + b"a:\r\n" * 21 + b"\r\n",
        GET[:-2] + b"a:\r\n" * 2000,
    ],
)
@in_loop
async def test_a_head_beyond_its_bounds_is_431(sent: bytes) -> None:
    async with serving(head_bytes=2000, head_fields=20) as (served, refused):
        assert (await (await served.connect(GET[:-2] + b"a:\r\n" * 19 + b"\r\n")).answer())[0] == 200
        await (await served.connect(sent)).refused(431, "head-too-large")
        slowly = await served.connect(GET)
        assert (await slowly.answer())[0] == 200
        for at in range(0, len(sent), 100):
            await slowly.send(sent[at : at + 100])
        await slowly.refused(431, "head-too-large")
        assert refused == {"head_too_large": 2} and served.toy.begun == 2


@in_loop
async def test_an_endless_head_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_BYTES", 8 << 20)
    async with serving() as (served, _):
        client = await served.connect(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            while True:
                await client.send(b"a:\r\n" * 16384)
                assert all(len(each.waiting) <= each.bounds.head_bytes for each in served.connections.all)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\nHost: x\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"NOSUCHMETHOD / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
@in_loop
async def test_what_is_no_clear_request_is_400_and_nothing_after_it_is_read(sent: bytes) -> None:
    async with serving() as (served, refused):
        await (await served.connect(sent + GET)).refused(400, "malformed-request")
        after = await served.connect(GET + sent + GET)
        assert (await after.answer())[0] == 200
        await after.refused(400, "malformed-request")
        assert refused == {"malformed_request": 2} and served.toy.begun == 1


@in_loop
async def test_a_body_with_broken_chunks_is_400_and_never_complete() -> None:
    async with serving() as (served, refused):
        client = await served.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n" + b"zz\r\n" + GET)
        await client.refused(400, "malformed-request")
        await eventually_async(lambda: served.toy.gone == 1)
        assert served.toy.bodies == 0 and refused == {"malformed_request": 1}


@in_loop
async def test_a_refusal_has_the_id_that_its_caller_sent_and_tells_the_application_its_status() -> None:
    async with serving(body_timeout=30) as (served, _):
        head = POST + b"X-Request-ID: mine\r\n"
        half = await served.connect(head + b"Content-Length: 100\r\n\r\n{")
        await eventually_async(lambda: served.toy.begun == 1)
        [guard] = served.connections.all
        scope = guard.cycle.scope
        served.pass_time(31)
        status, headers, _ = await half.answer()
        assert (status, headers["x-request-id"]) == (408, "mine") and scope["state"][REFUSED] == 408
        broken = await served.connect(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        status, headers, _ = await broken.answer()
        assert (status, headers["x-request-id"]) == (400, "mine")


@in_loop
async def test_a_head_that_is_refused_has_the_id_that_its_caller_sent() -> None:
    async with serving(head_timeout=10) as (served, _):
        head = b"GET / HTTP/1.1\r\nHost: a\r\nx-Request-Id:\tmine \r\n"
        for rest, refused_with in ((b"Host: b\r\n\r\n", 400), (b"X: " + b"x" * (1 << 20) + b"\r\n\r\n", 431)):
            status, headers, _ = await (await served.connect(head + rest)).answer()
            assert (status, headers["x-request-id"]) == (refused_with, "mine")
        half = await served.connect(head)
        await eventually_async(lambda: any(each.waiting for each in served.connections.all))
        served.pass_time(11)
        status, headers, _ = await half.answer()
        assert (status, headers["x-request-id"]) == (408, "mine")
        unsafe = await served.connect(head.replace(b"mine", b"a b") + b"Host: b\r\n\r\n")
        status, headers, _ = await unsafe.answer()
        assert status == 400 and re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


# Time


@in_loop
async def test_half_a_head_and_half_a_body_are_408() -> None:
    async with serving(head_timeout=10, body_timeout=30) as (served, refused):
        head = await served.connect(POST[:20])
        body = await served.connect(POST + b"Content-Length: 100\r\n\r\n{")
        chunks = await served.connect(POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab")
        await eventually_async(lambda: served.toy.begun == 2 and any(each.waiting for each in served.connections.all))
        served.pass_time(9)
        assert not refused
        served.pass_time(11)
        await head.refused(408, "too-slow")
        served.pass_time(29)
        assert refused == {"too_slow": 1}
        served.pass_time(31)
        await body.refused(408, "too-slow")
        await chunks.refused(408, "too-slow")
        await eventually_async(lambda: served.toy.gone == 2)


@in_loop
async def test_a_trickle_does_not_extend_a_limit() -> None:
    async with serving(head_timeout=10, body_timeout=30) as (served, _):
        client = await served.connect(POST[:20])
        await eventually_async(lambda: any(each.waiting for each in served.connections.all))
        (connection,) = served.connections.all
        limit = connection.deadline
        for at in range(20, len(POST)):
            await client.send(POST[at : at + 1])
        await eventually_async(lambda: connection.waiting == POST)
        assert connection.deadline == limit
        await client.send(b"Content-Length: 10\r\n\r\n")
        await eventually_async(lambda: served.toy.begun == 1)
        limit = connection.deadline
        for _ in range(9):
            await client.send(b"a")
        await eventually_async(lambda: connection.body_bytes == 9)
        assert connection.deadline == limit


@in_loop
async def test_idle_connections_are_closed_and_busy_ones_are_not() -> None:
    async with serving(head_timeout=10, body_timeout=30) as (served, refused):
        silent, kept = await served.connect(), await served.connect(GET)
        held = await served.connect(GET.replace(b"here", b"held"))
        assert (await kept.answer())[0] == 200
        await eventually_async(lambda: served.toy.begun == 2 and len(served.connections.all) == 3)
        served.pass_time(11)
        assert await silent.is_closed()
        await kept.send(GET)
        assert (await kept.answer())[0] == 200
        served.pass_time(guard.KEEP_ALIVE_S + 1)
        assert await kept.is_closed()
        served.toy.hold.set()
        assert (await held.answer())[0] == 200
        assert not refused


@in_loop
async def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    async with serving() as (served, _):
        client = await served.connect(GET.replace(b"here", b"large"))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await eventually_async(lambda: any(each.flow.write_paused for each in served.connections.all))
        served.pass_time(guard.SEND_TIMEOUT_S - 1)
        assert len(served.connections.all) == 1
        served.pass_time(guard.SEND_TIMEOUT_S + 1)
        await eventually_async(lambda: not served.connections.all)


# Bounds of all connections


@in_loop
async def test_the_longest_idle_connection_makes_room() -> None:
    async with serving(connections=3) as (served, refused):
        held = await served.connect(GET.replace(b"here", b"held"))
        half = await served.connect(POST)
        await eventually_async(lambda: served.toy.begun == 1 and any(each.waiting for each in served.connections.all))
        silent = await served.connect()
        await eventually_async(lambda: len(served.connections.all) == 3)
        for gone in (half, silent):  # in the order of their age
            probe = await served.connect(GET)
            assert (await probe.answer())[0] == 200
            if gone is half:
                await half.refused(503, "overloaded")
            else:
                assert await silent.is_closed()
        served.toy.hold.set()
        assert (await held.answer())[0] == 200
        assert refused == {"overloaded": 1}


@in_loop
async def test_where_every_connection_has_a_request_another_is_503() -> None:
    async with serving(connections=2) as (served, refused):
        held = [await served.connect(GET.replace(b"here", b"held")) for _ in range(2)]
        await eventually_async(lambda: served.toy.begun == 2)
        for _ in range(5):
            await (await served.connect(GET)).refused(503, "overloaded")
        served.toy.hold.set()
        assert [(await each.answer())[0] for each in held] == [200, 200]
        assert (await (await served.connect(GET)).answer())[0] == 200
        assert refused == {"overloaded": 5}


@in_loop
async def test_half_bodies_give_way_to_new_connections() -> None:
    async with serving(connections=5) as (served, _):
        for _ in range(5):
            await served.connect(POST + b"Content-Length: 9\r\n\r\n{")
        await eventually_async(lambda: served.toy.begun == 5)
        assert (await (await served.connect(GET)).answer())[0] == 200


@in_loop
async def test_the_oldest_large_unfinished_body_makes_room() -> None:
    large, small = b"a" * 40_000, b"a" * 100
    async with serving(unfinished_bytes=100_000) as (served, refused):
        head = POST + b"Content-Length: 50000\r\n\r\n"
        little = await served.connect(head + small)
        await eventually_async(lambda: served.connections.unfinished_bytes == 100)
        oldest = await served.connect(head + large)
        await eventually_async(lambda: served.connections.unfinished_bytes == 40_100)
        for _ in range(2):
            newest = await served.connect(head + large)
        await oldest.refused(503, "overloaded")
        await eventually_async(lambda: served.connections.unfinished_bytes == 80_100)
        await newest.send(b"a" * 10_000)
        assert (await newest.answer())[2]["body"] == "a" * 50_000
        await eventually_async(lambda: served.connections.unfinished_bytes == 40_100)
        await little.send(b"a" * 49_900)
        assert (await little.answer())[0] == 200
        assert refused == {"overloaded": 1}


# Answers before the request was read


@pytest.mark.parametrize("keep_alive", [True, False])
@in_loop
async def test_an_early_answer_reaches_a_client_that_sends_on(keep_alive: bool) -> None:
    """The client sends everything before it reads anything, as many do."""
    size = 20 << 20
    head = POST.replace(b"here", b"early") + b"Content-Length: %d\r\n" % size
    async with serving() as (served, refused):
        client = await served.connect(head + (b"" if keep_alive else b"Connection: close\r\n") + b"\r\n")
        for _ in range(size >> 20):
            await client.send(b"a" * (1 << 20))
        assert (await client.answer())[0] == 413
        if keep_alive:
            await client.send(GET)
            assert (await client.answer())[0] == 200
        else:
            assert await client.is_closed()
        assert not refused and served.connections.unfinished_bytes == 0


@in_loop
async def test_reading_on_for_an_early_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_BYTES", 1 << 20)
    head = POST.replace(b"here", b"early") + b"Content-Length: 1000000000\r\n\r\n"
    async with serving() as (served, _):
        endless, silent = await served.connect(head), await served.connect(head)
        with pytest.raises(ConnectionError):
            while True:
                await endless.send(b"a" * (1 << 16))
        assert (await silent.answer())[0] == 413
        await eventually_async(lambda: len(served.connections.all) == 1)
        served.pass_time(guard.LINGER_S + 1)
        await eventually_async(lambda: not served.connections.all)


# The end


@in_loop
async def test_draining_refuses_half_requests_and_closes_after_each_answer() -> None:
    async with serving() as (served, refused):
        held = await served.connect(GET.replace(b"here", b"held") + GET)
        body = await served.connect(POST + b"Content-Length: 100\r\n\r\n{")
        await eventually_async(lambda: served.toy.begun == 2)
        head = await served.connect(POST)
        await eventually_async(lambda: sum(bool(each.waiting) for each in served.connections.all) == 2)
        idle = await served.connect(GET)
        assert (await idle.answer())[0] == 200
        served.connections.begin_drain()
        await head.refused(503, "draining")
        await body.refused(503, "draining")
        for client in (idle, await served.connect()):  # probes still find out
            await client.send(GET)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close") and await client.is_closed()
        late = await served.connect(POST + b"Content-Length: 100\r\n\r\n{")
        await eventually_async(lambda: served.toy.begun == 6)
        served.pass_time(guard.DRAINING_S + 0.5)
        await late.refused(408, "too-slow")
        served.toy.hold.set()
        status, headers, _ = await held.answer()
        assert (status, headers["connection"]) == (200, "close") and await held.is_closed()
        assert refused == {"draining": 2, "too_slow": 1}


@in_loop
async def test_at_the_end_of_a_drain_everyone_is_told() -> None:
    async with serving() as (served, refused):
        held, idle = await served.connect(GET.replace(b"here", b"held")), await served.connect()
        await eventually_async(lambda: served.toy.begun == 1 and len(served.connections.all) == 2)
        served.connections.begin_drain()
        served.connections.end_drain()
        await held.refused(503, "draining")
        assert await idle.is_closed()
        assert refused == {"draining": 1}
