"""The sender records whatever a server does: answers, refusals, dropped connections."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from benchmarks.service.sender import Pool, Sent, closed_loop, encoded, latency, open_loop, send

BODY = json.dumps({"items": [], "timings_ms": {"queue": 12.5}})
ANSWER = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode()
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 3\r\ncontent-length: 2\r\n\r\n{}"

Handler = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def against(
    handler: Handler,
    work: Callable[[Pool], Coroutine[Any, Any, list[Sent]]],
    run: Callable[[Coroutine[Any, Any, list[Sent]]], list[Sent]] = asyncio.run,
) -> list[Sent]:
    """Runs the sender's work against a server that handles its n-th request with `handler`."""
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
                requests += 1
                await handler(requests, reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async def scenario() -> list[Sent]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await work(Pool(*server.sockets[0].getsockname()[:2]))

    return run(scenario())


REQUESTS = [encoded("here", {"path": "/recommend", "body": {"k": 1}, "headers": {"X-API-Key": "k"}})]


async def some_are_refused(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.01)
    answer = REFUSAL if number % 4 == 0 else ANSWER
    writer.write(answer[:30])
    await asyncio.sleep(0)
    writer.write(answer[30:])  # answers arrive in pieces


def test_an_open_loop_sends_at_its_rate_and_records_every_answer() -> None:
    sent = against(some_are_refused, lambda pool: open_loop(pool, REQUESTS, rate=200, seconds=1, seed=1))
    assert len(sent) == pytest.approx(200, abs=5 * 200**0.5)
    assert all(0.01 <= row.seconds < math.inf and 0 <= row.lag < row.seconds for row in sent)
    answered, refused = ([row for row in sent if row.status == status] for status in (200, 503))
    assert len(answered) + len(refused) == len(sent) and len(refused) == len(sent) // 4
    assert {row.retry_after for row in refused} == {3} and {row.queue for row in answered} == {0.0125}


def test_a_slow_server_does_not_slow_the_open_loop() -> None:
    async def never(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    sent = against(never, lambda pool: open_loop(pool, REQUESTS, rate=100, seconds=0.5, patience=0.1))
    assert len(sent) > 20 and all(math.isfinite(row.lag) for row in sent)
    assert all(row.status == 0 and row.seconds == math.inf for row in sent)


def test_dropped_connections_are_not_used_again() -> None:
    answered = dropped = 0

    async def drop(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered, dropped
        if number % 2:
            writer.write(ANSWER)
            answered += 1
        else:
            dropped += 1
        writer.close()

    sent = against(drop, lambda pool: open_loop(pool, REQUESTS, rate=50, seconds=1))
    assert {row.status for row in sent} == {0, 200}
    assert sum(row.status == 200 for row in sent) == answered
    # A request that is sent just when its connection is closed is neither answered nor dropped. Were all connections
    # used again, half of the requests would be such.
    assert 0 <= len(sent) - answered - dropped < len(sent) / 4


def test_a_closed_loop_waits_for_its_answers() -> None:
    at_once, most = 0, 0

    async def count(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        writer.write(ANSWER)

    sent = against(count, lambda pool: closed_loop(pool, REQUESTS, clients=3, seconds=0.3))
    assert most == 3 and 3 <= len(sent) <= 3 * 31
    assert {row.status for row in sent} == {200}


def test_times_are_finer_than_those_of_the_loop_that_the_sender_runs_on() -> None:
    async def at_once(number: int, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ANSWER)

    def in_whole_milliseconds(sent: list[Sent]) -> list[Sent]:
        return [row for row in sent if abs(1000 * row.seconds - round(1000 * row.seconds)) < 1e-4]

    sent = against(at_once, lambda pool: closed_loop(pool, REQUESTS, clients=1, seconds=0.1), run=uvloop.run)
    assert len(in_whole_milliseconds(sent)) < len(sent) / 2


def test_a_missing_service_is_reported() -> None:
    with pytest.raises(SystemExit, match="start it first"):
        asyncio.run(closed_loop(Pool("127.0.0.1", 9), REQUESTS, clients=1, seconds=0.1))


def test_a_sender_in_its_own_process_returns_its_rows() -> None:
    async def work(pool: Pool) -> list[Sent]:
        bodies = [{"path": "/recommend", "body": {}}]
        return await asyncio.to_thread(send, f"http://{pool.host}:{pool.port}", bodies, rate=50, seconds=0.5)

    sent = against(some_are_refused, work)
    assert len(sent) > 5 and {row.status for row in sent} == {200, 503}


def test_requests_without_an_answer_count_in_quantiles() -> None:
    rows = [Sent(0, 0, seconds, 200) for seconds in (0.3, 0.1, 0.2)] + [Sent(0, 0, 0.001, 503)]
    assert [latency(rows, share) for share in (0.25, 0.5, 0.75, 0.99)] == [0.1, 0.2, 0.3, math.inf]
