"""Five times what the service can do, open loop: what becomes of those it answers, and of those it refuses.

    OMP_NUM_THREADS=1 python -m benchmarks.service.overload

`ladder`: rates around the capacity. `best` and `overload`: the rate with the best goodput and five times that goodput,
in turns. Goodput are the answers within the request's time budget, counted once the queue has settled. A refusal's time
runs from when it was written; how late the sender was stands beside it as `lag`. `queue`: a longer queue, where
Retry-After has something to say: it is held against how long those waited that were let in at about that time.
`quota`: one client far beyond its quota beside one within it. `bars`: what is asked of all this.

Who sends is on the same machine, and on two cores has but the other one. What it takes of caches, memory and the kernel
is part of what is measured; so is the kernel's work for five times the requests, which falls on the service's core.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import resource
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, commit, record, table
from benchmarks.service.http_cost import histories_of_ids
from benchmarks.service.processes import Server, running_service, split_cores
from benchmarks.service.sender import Sent, send

RESULT = ROOT / "benchmarks/results/overload.json"
TIMES = 5  # the capacity
LADDER = (0.6, 0.8, 0.9, 1.0, 1.1, 1.3, 2.0)  # of what a closed loop gets
CLIENTS = 64  # of that closed loop
BUDGET_MS = 2000  # of every request: twice the queue's bound, so that who is let in can be in time
SETTLE = 2.0  # seconds at a turn's start that do not count
LONG_QUEUE_MS, LONG_BUDGET_MS, LONG_SETTLE = 4000, 15_000, 6.0
COLUMNS = [
    "part", "asked_per_s", "goodput_per_s", "p50_ms", "p99_ms", "refused_per_s", "refusal_p50_ms", "refusal_p99_ms",
    "other", "retry_after", "waited_s", "lag_p99_ms", "peak_mb",
]  # fmt: skip
BARS = ["bar", "value", "limit", "holds"]
REFUSED = (429, 503)

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cores", default="0", help="of the service; the sender takes the rest")
    parser.add_argument("--seconds", type=float, default=8, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns at the best rate and at five times it")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON; the plot lies beside it as SVG")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # everyone who waits has a connection
    code, began = commit(), time.perf_counter()
    rows = measure(given.bundle, given.steps, *split_cores(given.cores), given.seconds, given.rounds)
    bars = judged(rows)
    print(f"\n{table(rows, COLUMNS)}\n\n{table(bars, BARS)}")
    record(
        given.out,
        f"python -m benchmarks.service.overload --bundle {given.bundle} --steps {given.steps} --cores {given.cores} "
        f"--seconds {given.seconds:g} --rounds {given.rounds}",
        [0],
        [*rows, *bars],
        minutes=round((time.perf_counter() - began) / 60, 1),
        **code,
    )
    plot(rows, given.out.with_suffix(".svg"))
    return 0 if all(bar["holds"] for bar in bars) else 1


# Measured


def measure(bundle: Path, steps: int, cores: set[int], rest: set[int] | None, seconds: float, rounds: int) -> list[Row]:
    """All turns, in their order."""
    asked = requests(bundle, steps, BUDGET_MS)
    rows: list[Row] = []

    def turn(part: str, server: Server, rate: float, asked: Sequence[Row], settle: float, seconds: float) -> list[Sent]:
        server.peak_mb()
        sent = send(server.address, asked, rest, rate=rate, seconds=seconds, seed=len(rows))
        rows.append({"part": part, "asked_per_s": round(rate, 1), "peak_mb": round(server.peak_mb(), 1)})
        rows[-1] |= told(sent, settle, seconds, asked[0]["body"]["timeout_ms"])
        print(table(rows[-1:], COLUMNS), flush=True)
        return sent

    with running_service(bundle, cores=cores) as server:
        send(server.address, asked, rest, clients=CLIENTS, seconds=1)  # warms up
        closed = send(server.address, asked, rest, clients=CLIENTS, seconds=3)
        guess = len(closed) / max(row.due + row.seconds for row in closed)
        for share in LADDER:
            turn("ladder", server, share * guess, asked, SETTLE, seconds)
        best = max(rows, key=lambda row: row["goodput_per_s"])
        capacity = best["goodput_per_s"]
        for _ in range(rounds):
            turn("best", server, best["asked_per_s"], asked, SETTLE, seconds)
            turn("overload", server, TIMES * capacity, asked, SETTLE, seconds)
    with running_service(bundle, ["--max-queue-ms", str(LONG_QUEUE_MS)], cores) as server:
        patient = requests(bundle, steps, LONG_BUDGET_MS)
        send(server.address, patient, rest, clients=CLIENTS, seconds=1)
        turn("queue", server, TIMES * capacity, patient, LONG_SETTLE, LONG_SETTLE + seconds)
    options = ["--api-keys", ",".join(map(hashed, CALLERS)), "--quota", f"{math.ceil(0.4 * capacity)}/second"]
    with running_service(bundle, options, cores) as server:
        keyed = [one | {"headers": {"X-API-Key": caller(number)}} for number, one in enumerate(asked)]
        sent = turn("quotas", server, TIMES * capacity, keyed, SETTLE, seconds)
    for name in CALLERS:
        theirs = [row for number, row in enumerate(sent) if caller(number % len(asked)) == name]
        rows.append({"part": f"quota: {name}"} | told(theirs, SETTLE, seconds, BUDGET_MS))
    return rows


def requests(bundle: Path, steps: int, budget_ms: float) -> list[Row]:
    return [
        {
            "path": f"/recommend?reasoning_steps={steps}",
            "body": {"history": list(ids), "beam_width": 50, "timeout_ms": budget_ms},
        }
        for ids in histories_of_ids(bundle)
    ]


CALLERS = ("within", "beyond")


def caller(number: int) -> str:
    """Who sends a request: one in 32, a sixth of the capacity, comes from the client that keeps to its quota."""
    return CALLERS[number % 32 > 0]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def told(sent: Sequence[Sent], settle: float, end: float, budget_ms: float) -> Row:
    """One turn. Answers count when they arrive between `settle` and `end` (seconds), all else when it was due there.

    other: neither answered in time nor refused. waited_s: how long answered ones were in the queue. told_least,
    told_most: what 90% of the refusals say in Retry-After lies between these, less what those waited that were let in
    next to them.
    """
    good = [row for row in sent if row.status == 200 and 1000 * row.seconds <= budget_ms]
    inside = [row for row in sent if settle <= row.due < end]
    refused = [row for row in inside if row.status in REFUSED]
    answered = [row for row in good if settle <= row.due < end]
    refusals = [1000 * (row.seconds - row.lag) for row in refused]
    beside = [row.retry_after - waited(good, row.due) for row in refused if good]
    return {
        "goodput_per_s": round(sum(settle <= row.due + row.seconds < end for row in good) / (end - settle), 1),
        "p50_ms": at(0.5, [1000 * row.seconds for row in answered]),
        "p99_ms": at(0.99, [1000 * row.seconds for row in answered]),
        "refused_per_s": round(len(refused) / (end - settle), 1),
        "refusal_p50_ms": at(0.5, refusals),
        "refusal_p99_ms": at(0.99, refusals),
        "full": sum(row.status == 503 for row in inside),
        "asked": len(inside),
        "other": len(inside) - len(answered) - len(refused),
        "silent": sum(not row.retry_after for row in refused),
        "retry_after": at(0.5, [row.retry_after for row in refused]),
        "waited_s": at(0.5, [row.queue for row in answered]),
        "told_least": at(0.05, beside),
        "told_most": at(0.95, beside),
        "lag_p99_ms": at(0.99, [1000 * row.lag for row in inside]),
    }


def waited(answered: Sequence[Sent], due: float) -> float:
    """Seconds in the queue of the request that was due first from then on; of the last one after all of them."""
    return answered[min(bisect_left(answered, due, key=lambda row: row.due), len(answered) - 1)].queue


def at(share: float, values: Sequence[float]) -> float | None:
    """The quantile; None of nothing."""
    return round(sorted(values)[max(0, math.ceil(share * len(values)) - 1)], 2) if values else None


# Judged


def judged(rows: Sequence[Row]) -> list[Row]:
    """What is asked of the service, and whether these rows have it."""
    best, over = ([row for row in rows if row["part"] == part] for part in ("best", "overload"))
    (queue,), (within,), (beyond,) = (
        [row for row in rows if row["part"] == part] for part in ("queue", *(f"quota: {name}" for name in CALLERS))
    )
    ratio = median(o["goodput_per_s"] / b["goodput_per_s"] for b, o in zip(best, over, strict=True))
    refusing = [*over, queue, beyond]
    growth = max(row["peak_mb"] for row in over) - max(row["peak_mb"] for row in best)
    refusal = max(row["refusal_p99_ms"] for row in refusing)
    lost = sum(row["other"] for row in refusing) / sum(row["asked"] for row in refusing)
    silent = sum(row["silent"] for row in refusing)
    low, high = min(row["told_least"] for row in [*over, queue]), max(row["told_most"] for row in [*over, queue])
    bars = [
        (f"goodput at {TIMES} times / best", ratio, ">= 0.8", ratio >= 0.8),
        ("refusals, p99 in ms", refusal, "<= 100", refusal <= 100),
        ("share neither in time nor refused", lost, "<= 0.001", lost <= 0.001),
        ("refusals without Retry-After", silent, "<= 0", silent == 0),
        ("Retry-After less the wait, least, s", low, ">= -1", low >= -1),
        ("Retry-After less the wait, most, s", high, "<= 2", high <= 2),
        ("memory beyond the best rate's, MB", growth, "<= 50", growth <= 50),
        ("over its quota, yet 503", beyond["full"], "<= 0", beyond["full"] == 0),
        ("within its quota, yet refused", within["refused_per_s"], "<= 0", within["refused_per_s"] == 0),
    ]
    return [
        {"part": "bars", "bar": bar, "value": f"{value:.2f}", "limit": limit, "holds": holds}
        for bar, value, limit, holds in bars
    ]


# Drawn


def plot(rows: Sequence[Row], path: Path) -> None:
    """Goodput and refusals against load, latencies below. The same rows give the same file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = sorted((r for r in rows if r["part"] in ("ladder", "best", "overload")), key=lambda r: r["asked_per_s"])
    load = [row["asked_per_s"] for row in shown]
    with rc_context({"svg.hashsalt": "overload", "font.size": 9, "svg.fonttype": "path"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        counts, times = figure.subplots(2, 1, sharex=True)
        counts.plot(load, [row["goodput_per_s"] for row in shown], "o-", color="#0f766e", label="answered in time")
        counts.plot(load, [row["refused_per_s"] for row in shown], "o-", color="#9a3412", label="refused")
        counts.set(ylabel="a second", ylim=(0, None))
        for name, label, color in (("p99_ms", "answers", "#0f766e"), ("refusal_p99_ms", "refusals", "#9a3412")):
            known = [(row["asked_per_s"], row[name]) for row in shown if row[name] is not None]
            times.plot(*zip(*known, strict=True), "o-", color=color, label=f"{label}, p99")
        times.set(ylabel="milliseconds", yscale="log", xlabel="requests sent a second (Poisson, open loop)")
        for axes in (counts, times):
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
