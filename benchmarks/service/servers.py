"""The service compared with what one would build today: FastAPI or LitServe around transformers' `generate`.

    OMP_NUM_THREADS=1 python -m benchmarks.service.servers

All serve the same bundle on the same core, with one thread of arithmetic, a beam of 50 and no reasoning steps; no user
is named, so that nothing is cached. The sender has the other cores. Our service writes a log line per request, its
default; the others write none, theirs here.

First every server gets the same requests, many at once, and must give the same answers: the same items in the same
order, scores within 1e-3. Then comes the highest rate, in an open loop, at which p99 stays within a limit; a refused
request counts as never answered. Each rate is found by bisection, servers in turns, and all of it several times: a row
has the median and the range over these repeats. `ours_times` is the ratio of the rates within one repeat.

While one server is measured the others are stopped (SIGSTOP), so that they use no CPU. `cpu_ms` is the CPU time of a
request, over all processes of a server, which other work on the machine affects less.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.service.processes import Server, running, split_cores
from benchmarks.service.sender import Sent, latency, rate_of, send

OURS = "streamrec"
BARS = {"FastAPI, generate": 8.0, "LitServe, generate": 5.0}  # how many times their rate ours must be
STEPS, BEAM = 0, 50
TOLERANCE = 1e-3  # of a score
CHECKED = 32  # requests whose answers are compared
CLIENTS = 32  # of the closed loop whose rate starts the bisection
BETWEEN = (0.4, 1.6)  # times the closed loop's rate: the interval that is bisected
COLUMNS = [
    "server", "requests_per_s", "lowest", "highest", "p50_ms", "p99_ms", "cpu_ms", "ours_times", "ours_times_lowest",
    "ours_times_highest", "at_least", "holds",
]  # fmt: skip

Row = dict[str, Any]


def main() -> int:
    parser = argument_parser("benchmarks.service.servers", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--p99-ms", type=float, default=1000, help="longest p99 of a rate that counts (%(default)s)")
    parser.add_argument("--cores", default="0", help="of the servers; the sender gets the others (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="searches for the highest rate per server (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rates tried per search (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="how long each rate is sent (%(default)s)")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/servers.json")
    options = parser.parse_args()
    run = Run(parser, options)
    cores, rest = split_cores(options.cores)
    bodies, trials = requests(options.bundle), list[Row]()
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(command, cores)) for name, command in commands(options.bundle)}
        answers = {
            name: asyncio.run(all_answers(server.address, [as_sent(name, body) for body in bodies[:CHECKED]]))
            for name, server in servers.items()
        }
        for name in BARS:
            if difference := first_difference(answers[OURS], answers[name]):
                raise SystemExit(f"{name} gives other answers: {difference}")
        print(f"{CHECKED} answers are the same\n", flush=True)
        for repeat in range(options.repeats):
            found = search(servers, bodies, rest, options.p99_ms / 1000, options.rounds, options.seconds, repeat)
            trials += [{"repeat": repeat, **row} for row in found]
    rows = compared(trials)
    print(table(rows, COLUMNS))
    terms = {"steps": STEPS, "beam": BEAM, "p99_limit_ms": options.p99_ms, "log_level": "default"}
    run.record(options.out, list(range(options.repeats)), rows, terms=terms, trials=trials)
    return 0 if all(row.get("holds", True) for row in rows) else 1


def commands(bundle: Path) -> list[tuple[str, list[str]]]:
    """Every server's name and the command that starts it."""
    theirs = ["-m", "benchmarks.service.generate_servers"]
    started = {OURS: ["-m", "app", "serve"]} | {name: [*theirs, name.split(",")[0].lower()] for name in BARS}
    return [(name, [*command, "--bundle", str(bundle)]) for name, command in started.items()]


def requests(bundle: Path, count: int = 512) -> list[Row]:
    """Bodies with histories of 1 to 20 items."""
    ids = pq.read_table(bundle / "catalogue.parquet", columns=["item_id"])["item_id"].to_pylist()
    rng = np.random.default_rng(0)
    histories = [rng.choice(ids, rng.integers(1, 21), replace=False).tolist() for _ in range(count)]
    return [{"history": history, "k": 10} for history in histories]


def as_sent(name: str, body: Row) -> Row:
    """The request as this server takes it. `generate` cannot exclude seen items, so ours must not either."""
    if name != OURS:
        return {"path": "/recommend", "body": body}
    return {
        "path": f"/recommend?reasoning_steps={STEPS}",
        "body": body | {"beam_width": BEAM, "exclude_seen": False},
    }


# The same answers

Answer = list[tuple[str, float]]  # item ids and scores, best first


async def all_answers(address: str, sent: Sequence[Row]) -> list[Answer]:
    """The answers to requests that are sent all at once."""
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:
        responses = await asyncio.gather(*(http.post(one["path"], json=one["body"]) for one in sent))
    return [
        [(item["item_id"], item["score"]) for item in response.raise_for_status().json()["items"]]
        for response in responses
    ]


def first_difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> str | None:
    """The first request to which two servers give different answers, as text."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if [item for item, _ in one] != [item for item, _ in other]:
            return f"request {number}: items {one} and {other}"
        if any(abs(a - b) > TOLERANCE for (_, a), (_, b) in zip(one, other, strict=True)):
            return f"request {number}: scores {one} and {other}"
    return None


# Requests a second


def search(
    servers: dict[str, Server],
    bodies: Sequence[Row],
    cores: set[int] | None,
    limit: float,
    rounds: int,
    seconds: float,
    repeat: int,
) -> list[Row]:
    """One bisection per server, in turns: all rates that were tried, and whether each kept its p99 within the limit."""
    sent_to = {name: [as_sent(name, body) for body in bodies] for name in servers}
    bounds, trials = {}, []
    for name, server in servers.items():
        with others_stopped(servers, name):
            closed = rate_of(send(server.address, sent_to[name], cores, clients=CLIENTS, seconds=seconds / 2))
        bounds[name] = [share * closed for share in BETWEEN]
    for number in range(rounds):
        for name, server in servers.items():
            rate, before = sum(bounds[name]) / 2, server.cpu_seconds()
            with others_stopped(servers, name):
                seed = repeat * rounds + number
                sent = send(server.address, sent_to[name], cores, rate=rate, seconds=seconds, seed=seed)
            trials.append(trial(name, sent, seconds, limit, server.cpu_seconds() - before))
            bounds[name][0 if trials[-1]["held"] else 1] = rate
            print(table(trials[-1:], list(trials[-1])), flush=True)
    return trials


@contextmanager
def others_stopped(servers: dict[str, Server], name: str) -> Iterator[None]:
    """No process of the other servers runs in this block."""
    others = [server.pid for other, server in servers.items() if other != name]
    try:
        for pid in others:
            os.killpg(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in others:
            os.killpg(pid, signal.SIGCONT)


def trial(name: str, sent: Sequence[Sent], seconds: float, limit: float, cpu: float) -> Row:
    """One rate at one server: requests sent, latencies, and whether p99 stayed within the limit (seconds)."""
    p50, p99 = latency(sent, 0.5), latency(sent, 0.99)
    return {
        "server": name,
        "requests_per_s": round(len(sent) / seconds, 1),
        "p50_ms": round(1000 * p50, 1) if math.isfinite(p50) else None,
        "p99_ms": round(1000 * p99, 1) if math.isfinite(p99) else None,
        "cpu_ms": round(1000 * cpu / len(sent), 2),
        "refused": sum(row.status != 200 for row in sent),
        "held": p99 <= limit,
    }


def compared(trials: Sequence[Row]) -> list[Row]:
    """A row per server: the highest rate that it kept up, median and range over repeats, and how it compares."""
    repeats = sorted({row["repeat"] for row in trials})
    best = {name: [_best(trials, name, repeat) for repeat in repeats] for name in (OURS, *BARS)}
    rows = []
    for name, kept in best.items():
        rates = [row["requests_per_s"] for row in kept]
        row: Row = {"server": name, "requests_per_s": median(rates), "lowest": min(rates), "highest": max(rates)}
        row |= {column: median(one[column] for one in kept) for column in ("p50_ms", "p99_ms", "cpu_ms")}
        if name in BARS:
            times = [ours["requests_per_s"] / rate for ours, rate in zip(best[OURS], rates, strict=True)]
            row |= {
                "ours_times": round(median(times), 1),
                "ours_times_lowest": round(min(times), 1),
                "ours_times_highest": round(max(times), 1),
                "at_least": BARS[name],
                "holds": median(times) >= BARS[name],
            }
        rows.append(row)
    return rows


def _best(trials: Sequence[Row], name: str, repeat: int) -> Row:
    held = [row for row in trials if (row["server"], row["repeat"], row["held"]) == (name, repeat, True)]
    if not held:
        raise SystemExit(f"{name} kept up no rate that was tried; allow a longer p99 or more rounds.")
    return max(held, key=lambda row: row["requests_per_s"])


if __name__ == "__main__":
    sys.exit(main())
