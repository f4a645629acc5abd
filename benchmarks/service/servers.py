"""The service beside what people would build today: FastAPI with transformers' `generate`, and LitServe with batching.

    OMP_NUM_THREADS=1 python -m benchmarks.service.servers

The same bundle, the same core, one thread of arithmetic, a beam of 50 without reasoning; who sends sits on the other
cores. First every server answers the same requests, many at once, and the answers must be the same: the same items in
the same order, scores within 1e-3. Then, per server, the most requests a second whose p99 stays within a limit, refused
ones counting as never answered: an open loop, each rate found by bisection, the servers taking turns. The others are
stopped meanwhile (SIGSTOP): what they still compute, or how they wait, would be taken from the one whose turn it is.
`cpu_ms` is what a request cost there in CPU time of all the server's processes, which a neighbour on the machine
changes less.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import ROOT, commit, record, table
from benchmarks.service.processes import Server, running, split_cores
from benchmarks.service.sender import Sent, quantile, send

RESULT = ROOT / "benchmarks/results/servers.json"
OURS = "streamrec"
BARS = {"FastAPI, generate": 8.0, "LitServe, generate": 5.0}  # so many times their requests a second
TOLERANCE = 1e-3  # of a score
CHECKED = 32  # requests whose answers are compared
CLIENTS = 32  # of the closed loop that tells where to look
BETWEEN = (0.4, 1.6)  # times that closed loop's rate, where the highest that is kept up is looked for
COLUMNS = ["server", "requests_per_s", "p50_ms", "p99_ms", "cpu_ms", "ours_times", "at_least", "holds"]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service.servers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--p99-ms", type=float, default=1000, help="the limit, for all")
    parser.add_argument("--cores", default="0", help="of the servers; the sender takes the rest")
    parser.add_argument("--rounds", type=int, default=5, help="rates tried per server")
    parser.add_argument("--seconds", type=float, default=8, help="length of a turn")
    given = parser.parse_args()
    code, began = commit(), time.perf_counter()
    cores, rest = split_cores(given.cores)
    asked = requests(given.bundle)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(command, cores)) for name, command in commands(given.bundle)}
        answers = {
            name: asyncio.run(ask_all(server.address, [as_asked(name, body) for body in asked[:CHECKED]]))
            for name, server in servers.items()
        }
        for name in BARS:
            if difference := first_difference(answers[OURS], answers[name]):
                raise SystemExit(f"{name} answers otherwise: {difference}")
        print(f"{CHECKED} answers are the same\n", flush=True)
        trials = search(servers, asked, rest, given.p99_ms / 1000, given.rounds, given.seconds)
    rows = compared(trials)
    print(table(rows, COLUMNS))
    record(
        RESULT,
        f"python -m benchmarks.service.servers --bundle {given.bundle} --p99-ms {given.p99_ms:g} --cores {given.cores} "
        f"--rounds {given.rounds} --seconds {given.seconds:g}",
        [0],
        rows,
        minutes=round((time.perf_counter() - began) / 60, 1),
        p99_limit_ms=given.p99_ms,
        trials=trials,
        **code,
    )
    return 0 if all(row.get("holds", True) for row in rows) else 1


def commands(bundle: Path) -> list[tuple[str, list[str]]]:
    """Every server's name and how it is started."""
    theirs = ["-m", "benchmarks.service.generate_servers"]
    ours = ["-m", "app", "serve", "--log-level", "warning"]
    started = {OURS: ours} | {name: [*theirs, name.split(",")[0].lower()] for name in BARS}
    return [(name, [*command, "--bundle", str(bundle)]) for name, command in started.items()]


def requests(bundle: Path, count: int = 512) -> list[dict[str, Any]]:
    """Bodies with histories of 1 to 20 items."""
    ids = pq.read_table(bundle / "catalogue.parquet", columns=["item_id"])["item_id"].to_pylist()
    rng = np.random.default_rng(0)
    histories = [rng.choice(ids, rng.integers(1, 21), replace=False).tolist() for _ in range(count)]
    return [{"history": history, "k": 10} for history in histories]


def as_asked(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """The request that a server is sent. `generate` knows no rule against items seen, so ours is not to follow it."""
    if name != OURS:
        return {"path": "/recommend", "body": body}
    return {"path": "/recommend?reasoning_steps=0", "body": body | {"beam_width": 50, "exclude_seen": False}}


# The same answers

Answer = list[tuple[str, float]]  # item ids and scores, best first


async def ask_all(address: str, asked: Sequence[dict[str, Any]]) -> list[Answer]:
    """The answers to requests that arrive all at once."""
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:
        responses = await asyncio.gather(*(http.post(one["path"], json=one["body"]) for one in asked))
    return [
        [(item["item_id"], item["score"]) for item in response.raise_for_status().json()["items"]]
        for response in responses
    ]


def first_difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> str | None:
    """Where two servers do not say the same, for people."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if [item for item, _ in one] != [item for item, _ in other]:
            return f"request {number}: items {one} and {other}"
        if any(abs(a - b) > TOLERANCE for (_, a), (_, b) in zip(one, other, strict=True)):
            return f"request {number}: scores {one} and {other}"
    return None


# Requests a second


def search(
    servers: dict[str, Server],
    asked: Sequence[dict[str, Any]],
    cores: set[int] | None,
    limit: float,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """All rates that were tried, and whether each was kept up."""
    sent_to = {name: [as_asked(name, body) for body in asked] for name in servers}
    bounds = {}
    for name, server in servers.items():
        with others_stopped(servers, name):
            sent = send(server.address, sent_to[name], cores, clients=CLIENTS, seconds=seconds / 2)
        closed = len(sent) / max(row.due + row.seconds for row in sent)
        bounds[name] = [share * closed for share in BETWEEN]
    trials = []
    for number in range(rounds):
        for name, server in servers.items():
            rate, before = sum(bounds[name]) / 2, server.cpu_seconds()
            with others_stopped(servers, name):
                sent = send(server.address, sent_to[name], cores, rate=rate, seconds=seconds, seed=number)
            trials.append(trial(name, sent, seconds, limit, server.cpu_seconds() - before))
            bounds[name][0 if trials[-1]["held"] else 1] = rate
            print(table(trials[-1:], list(trials[-1])), flush=True)
    return trials


@contextmanager
def others_stopped(servers: dict[str, Server], name: str) -> Iterator[None]:
    """Nothing of the other servers runs in this block."""
    others = [server.pid for other, server in servers.items() if other != name]
    try:
        for pid in others:
            os.killpg(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in others:
            os.killpg(pid, signal.SIGCONT)


def trial(name: str, sent: Sequence[Sent], seconds: float, limit: float, cpu: float) -> dict[str, Any]:
    """A turn of one server: what was sent, how long answers took, and whether p99 stayed within the limit (seconds)."""
    p50, p99 = quantile(sent, 0.5), quantile(sent, 0.99)
    return {
        "server": name,
        "requests_per_s": round(len(sent) / seconds, 1),
        "p50_ms": round(1000 * p50, 1) if math.isfinite(p50) else None,
        "p99_ms": round(1000 * p99, 1) if math.isfinite(p99) else None,
        "cpu_ms": round(1000 * cpu / len(sent), 2),
        "refused": sum(row.status != 200 for row in sent),
        "held": p99 <= limit,
    }


def compared(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per server: the highest rate it kept up, and how many times as much ours did."""
    best = {}
    for row in sorted(trials, key=lambda row: row["requests_per_s"]):
        if row["held"]:
            best[row["server"]] = row
    rows = []
    for name in (OURS, *BARS):
        if name not in best:
            raise SystemExit(f"{name} kept up no rate that was tried; allow a longer p99 or more rounds.")
        row = {column: best[name][column] for column in COLUMNS if column in best[name]}
        if name in BARS:
            times = round(best[OURS]["requests_per_s"] / best[name]["requests_per_s"], 1)
            row |= {"ours_times": times, "at_least": BARS[name], "holds": times >= BARS[name]}
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
