"""Sends requests to a service from a process of its own, and records when each was answered.

    python -m benchmarks.service.sender --address http://127.0.0.1:8000 --requests FILE --rate 100 --seconds 10 --out F

`--rate` is an open loop: requests are sent at the times of a Poisson process, whether or not earlier ones have been
answered, and latency counts from the time a request was due. `--clients` is a closed loop of that many clients, each of
which waits for its answer. FILE holds JSON lines {"method", "path", "body", "headers"}, which are sent over and over.
The output has one row per request, see `Sent`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import astuple, dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter  # the time of uvloop's loops is in whole milliseconds
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

from benchmarks.common import ROOT
from benchmarks.quantiles import quantile
from benchmarks.service.processes import pinned

CONNECTIONS = 4000  # open at once; a request that finds none free is not sent
PATIENCE = 15.0  # seconds after the last request was due; what is not answered by then counts as never answered


@dataclass(slots=True)
class Sent:
    """One request. Seconds: `due` since the start of the loop, `lag` from due to written, `seconds` from due to
    answered, `queue` in the service's queue, as its answer says."""

    due: float
    lag: float = math.inf  # not written: no connection
    seconds: float = math.inf  # not answered
    status: int = 0
    retry_after: int = 0
    queue: float = 0.0


Done = Callable[[int, int, float], None]  # status, retry_after, queue


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._received = pool, b""
        self._done: Done | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, data: bytes, done: Done) -> None:
        self._done = done
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) < int(headers.get(b"content-length", b"0")):
            return
        done, self._done, self._received = self._done, None, b""
        assert done is not None, "an answer without a request"
        status = int(head[9:12])
        queue = json.loads(body).get("timings_ms", {}).get("queue", 0.0) / 1000 if status == 200 else 0.0
        done(status, int(headers.get(b"retry-after", b"0")), queue)
        self._pool.free[self] = None

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.lost(self)
        if self._done is not None:
            self._done(0, 0, 0.0)


class Pool:
    """Idle connections, the most recently used first, and new ones where none is idle."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.free: dict[Connection, None] = {}
        self._open = 0

    async def take(self) -> Connection | None:
        if self.free:
            return self.free.popitem()[0]
        if self._open >= CONNECTIONS:
            return None
        self._open += 1
        try:
            _, made = await asyncio.get_running_loop().create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self._open -= 1
            return None
        return made

    def lost(self, connection: Connection) -> None:
        self.free.pop(connection, None)
        self._open -= 1


async def exchange(pool: Pool, start: float, row: Sent, request: bytes) -> None:
    """Sends one request and completes its row when it is answered or its connection is lost."""
    connection = await pool.take()
    if connection is None:
        return
    answered = asyncio.get_running_loop().create_future()
    row.lag = perf_counter() - start - row.due

    def done(status: int, retry_after: int, queue: float) -> None:
        if status:
            row.seconds = perf_counter() - start - row.due
        row.status, row.retry_after, row.queue = status, retry_after, queue
        if not answered.done():
            answered.set_result(None)

    connection.send(request, done)
    await answered


async def open_loop(
    pool: Pool, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0, patience: float = PATIENCE
) -> list[Sent]:
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, int(2 * rate * seconds) + 20))
    sent = [Sent(float(time)) for time in due[due < seconds]]
    start, tasks = perf_counter(), set()
    for row, request in zip(sent, cycle(requests)):
        if (wait := start + row.due - perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(exchange(pool, start, row, request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=patience)
        for task in late:
            task.cancel()
    return sent


async def closed_loop(pool: Pool, requests: Sequence[bytes], clients: int, seconds: float) -> list[Sent]:
    source, start = cycle(requests), perf_counter()
    sent: list[Sent] = []

    async def client() -> None:
        while (now := perf_counter() - start) < seconds:
            row = Sent(now)
            await exchange(pool, start, row, next(source))
            if not row.status:
                raise SystemExit("The service refuses or drops connections; start it first.")
            sent.append(row)

    await asyncio.gather(*(client() for _ in range(clients)))
    return sent


def encoded(host: str, request: dict[str, Any]) -> bytes:
    body = json.dumps(request["body"]).encode() if "body" in request else b""
    headers = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}\r\n" for name, value in (headers | request.get("headers", {})).items()]
    return f"{request.get('method', 'POST')} {request['path']} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.sender", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--rate", type=float, help="requests a second, open loop")
    parser.add_argument("--clients", type=int, help="closed loop")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    address = urlsplit(given.address)
    assert address.hostname and address.port
    requests = [encoded(address.netloc, json.loads(line)) for line in given.requests.read_text().splitlines()]
    pool = Pool(address.hostname, address.port)
    work: Coroutine[Any, Any, list[Sent]]
    if given.rate:
        work = open_loop(pool, requests, given.rate, given.seconds, given.seed)
    else:
        work = closed_loop(pool, requests, given.clients, given.seconds)
    given.out.write_text(json.dumps([astuple(row) for row in uvloop.run(work)]))


def send(
    address: str, requests: Sequence[dict[str, Any]], cores: set[int] | None = None, **options: float
) -> list[Sent]:
    """Runs a sender in a process of its own, on these cores. options: rate or clients, seconds, seed."""
    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "requests.jsonl", Path(folder) / "sent.json"
        file.write_text("\n".join(json.dumps(request) for request in requests))
        command = [sys.executable, "-m", "benchmarks.service.sender", "--address", address, "--requests", str(file)]
        command += ["--out", str(out)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        subprocess.run(pinned(command, cores), cwd=ROOT, check=True)
        return [Sent(*row) for row in json.loads(out.read_text())]


def latency(sent: Sequence[Sent], share: float) -> float:
    """Seconds within which this share of all requests was answered with 200; infinite where fewer were."""
    seconds = quantile([row.seconds if row.status == 200 else math.inf for row in sent], share)
    assert seconds is not None, "no request was sent"
    return seconds


def rate_of(sent: Sequence[Sent]) -> float:
    """Requests a second of a closed loop, from its start to its last answer."""
    return len(sent) / max(row.due + row.seconds for row in sent)


if __name__ == "__main__":
    main()
