"""Five times the load that the service can carry, open loop: how many requests it still answers in time, and what it
tells the others.

    OMP_NUM_THREADS=1 python -m benchmarks.service.overload

"In time" is within the request's budget of 2,000 ms, twice the bound of the service's queue; goodput is the number of
answers in time a second, counted once the queue has settled.

    ladder    loads around the capacity of a closed loop; the one with the best goodput is the best load
    best      the best load again, in turns with
    overload  five times the best goodput
    queue     the same with a longer queue, where Retry-After is compared with the wait of requests admitted then
    quota     a client far beyond its quota together with one within it
    shares    two light clients, each of which waits for its answers, alone and in turns beside one with 64 connections
    bars      the targets, and whether they are met; what is measured in turns has a median and a range

A refusal's time starts when the request was written; `lag` is how late the sender was. The service writes its log as
in production. The sender runs on the same machine and on two cores has just the other one: its use of caches, memory
and kernel is part of what is measured, and so is the kernel's work on the service's core for five times the requests.
"""

from __future__ import annotations

import hashlib
import math
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.plots import BROWN, TEAL, drawing
from benchmarks.service.http_cost import histories_of_ids
from benchmarks.service.overload_summary import CALLERS, SHARES, TIMES, Row, bars, summarise
from benchmarks.service.processes import Server, running_service, split_cores
from benchmarks.service.sender import Sent, rate_of, send

LADDER = (0.6, 0.8, 0.9, 1.0, 1.1, 1.3, 2.0)  # times the rate of a closed loop
CLIENTS = 64  # of that closed loop
BEAM = 50
BUDGET_MS = 2000  # of every request: twice the queue's bound, so that an admitted request can be in time
SETTLE = 2.0  # seconds at the start of a turn that do not count
LIGHT = ("light 1", "light 2")  # clients of one connection each
HEAVY = "heavy"  # the client with all the others
LONG_QUEUE_MS, LONG_BUDGET_MS, LONG_SETTLE = 4000, 15_000, 6.0
COLUMNS = [
    "part", "offered_per_s", "goodput_per_s", "p50_ms", "p99_ms", "refused_per_s", "refusal_p50_ms", "refusal_p99_ms",
    "lost", "retry_after_s", "waited_s", "lag_p99_ms", "peak_mb",
]  # fmt: skip
BARS = ["bar", "value", "lowest", "highest", "limit", "holds"]


def main() -> int:
    parser = argument_parser("benchmarks.service.overload", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--steps", type=int, default=4, help="reasoning steps of every request (%(default)s)")
    parser.add_argument("--cores", default="0", help="of the service; the sender gets the others (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="length of a turn (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns at the best load and at five times it (%(default)s)"
    )
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/overload.json")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every waiting request has a connection
    run = Run(parser, options)
    cores = split_cores(options.cores)
    rows = measure(options.bundle, options.steps, *cores, options.seconds, options.rounds)
    found = bars(rows, BUDGET_MS)
    print(f"\n{table(rows, COLUMNS)}\n\n{table(found, BARS)}")
    terms = {"steps": options.steps, "beam": BEAM, "budget_ms": BUDGET_MS, "settle_s": SETTLE, "log_level": "default"}
    run.record(options.out, [0], [*rows, *found], terms=terms)
    return 0 if all(bar["holds"] for bar in found) else 1


def measure(bundle: Path, steps: int, cores: set[int], rest: set[int] | None, seconds: float, rounds: int) -> list[Row]:
    """All turns, in order."""
    bodies = requests(bundle, steps, BUDGET_MS)
    rows: list[Row] = []

    def turn(
        part: str, server: Server, rate: float, bodies: Sequence[Row], settle: float, seconds: float
    ) -> list[Sent]:
        server.peak_mb()
        sent = send(server.address, bodies, rest, rate=rate, seconds=seconds, seed=len(rows))
        rows.append({"part": part, "offered_per_s": round(rate, 1), "peak_mb": round(server.peak_mb(), 1)})
        rows[-1] |= summarise(sent, settle, seconds, bodies[0]["body"]["timeout_ms"])
        print(table(rows[-1:], COLUMNS), flush=True)
        return sent

    with running_service(bundle, cores=cores) as server:
        send(server.address, bodies, rest, clients=CLIENTS, seconds=1)  # warms up
        closed = rate_of(send(server.address, bodies, rest, clients=CLIENTS, seconds=3))
        for share in LADDER:
            turn("ladder", server, share * closed, bodies, SETTLE, seconds)
        best = max(rows, key=lambda row: row["goodput_per_s"])
        capacity = best["goodput_per_s"]
        for _ in range(rounds):
            turn("best", server, best["offered_per_s"], bodies, SETTLE, seconds)
            turn("overload", server, TIMES * capacity, bodies, SETTLE, seconds)
    with running_service(bundle, ["--max-queue-ms", str(LONG_QUEUE_MS)], cores) as server:
        patient = requests(bundle, steps, LONG_BUDGET_MS)
        send(server.address, patient, rest, clients=CLIENTS, seconds=1)
        turn("queue", server, TIMES * capacity, patient, LONG_SETTLE, LONG_SETTLE + seconds)
    quota = math.ceil(0.4 * capacity)
    options = ["--api-keys", ",".join(map(hashed, CALLERS)), "--quota", f"{quota}/second"]
    with running_service(bundle, options, cores) as server:
        keyed = [body | {"headers": {"X-API-Key": caller(number)}} for number, body in enumerate(bodies)]
        sent = turn("quotas", server, TIMES * capacity, keyed, SETTLE, seconds)
    for name in CALLERS:
        of_caller = [row for number, row in enumerate(sent) if caller(number % len(bodies)) == name]
        rows.append({"part": f"quota: {name}", "quota_per_s": quota} | summarise(of_caller, SETTLE, seconds, BUDGET_MS))
    with running_service(bundle, ["--api-keys", ",".join(map(hashed, (*LIGHT, HEAVY)))], cores) as server:
        rows += shares(server, bodies, rest, seconds, rounds)
    return rows


def shares(server: Server, bodies: Sequence[Row], rest: set[int] | None, seconds: float, rounds: int) -> list[Row]:
    """Turns of the light clients alone, and then beside the heavy one. All work in closed loops."""
    light = [body | {"headers": {"X-API-Key": LIGHT[number % 2]}} for number, body in enumerate(bodies)]
    heavy = [body | {"headers": {"X-API-Key": HEAVY}} for body in bodies]
    alone, beside, others = SHARES
    rows: list[Row] = []
    send(server.address, light, rest, clients=2, seconds=1)  # warms up
    for _ in range(rounds):
        turns = {alone: send(server.address, light, rest, clients=2, seconds=seconds)}
        with ThreadPoolExecutor(1) as pool:  # the heavy one begins first and ends last
            busy = pool.submit(send, server.address, heavy, rest, clients=CLIENTS, seconds=seconds + SETTLE)
            turns[beside] = send(server.address, light, rest, clients=2, seconds=seconds)
            turns[others] = busy.result()
        rows += [{"part": part} | summarise(sent, SETTLE, seconds, BUDGET_MS) for part, sent in turns.items()]
        print(table(rows[-3:], COLUMNS), flush=True)
    return rows


def requests(bundle: Path, steps: int, budget_ms: float) -> list[Row]:
    return [
        {
            "path": f"/recommend?reasoning_steps={steps}",
            "body": {"history": list(ids), "beam_width": BEAM, "timeout_ms": budget_ms},
        }
        for ids in histories_of_ids(bundle)
    ]


def caller(number: int) -> str:
    """Who sends a request: one in 32, a sixth of the capacity, comes from the client that stays within its quota."""
    return CALLERS[0] if number % 32 == 0 else CALLERS[1]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def plot(result: dict[str, Any], path: Path) -> None:
    """Goodput and refusals against load, latencies below."""
    turns = [row for row in result["rows"] if row["part"] in ("ladder", "best", "overload")]
    shown = sorted(turns, key=lambda row: row["offered_per_s"])
    load = [row["offered_per_s"] for row in shown]
    with drawing(path, 8, 5) as figure:
        counts, times = figure.subplots(2, 1, sharex=True)
        counts.plot(load, [row["goodput_per_s"] for row in shown], "o-", color=TEAL, label="answered in time")
        counts.plot(load, [row["refused_per_s"] for row in shown], "o-", color=BROWN, label="refused")
        counts.set(ylabel="a second", ylim=(0, None))
        for name, label, color in (("p99_ms", "answers", TEAL), ("refusal_p99_ms", "refusals", BROWN)):
            known = [(row["offered_per_s"], row[name]) for row in shown if row[name] is not None]
            times.plot(*zip(*known, strict=True), "o-", color=color, label=f"{label}, p99")
        times.set(ylabel="milliseconds", yscale="log", xlabel="requests sent a second (Poisson, open loop)")
        for axes in (counts, times):
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
