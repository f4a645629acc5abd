"""How many replicas and how much Redis a load needs, and at what price: simulated from service times measured here.

    python -m benchmarks.service.capacity                              measure, check against locust, plan large loads
    python -m benchmarks.service.capacity --load 50,200 --replicas 4   predict from the last measurement

Service times come from the answers of a running service under locust's load at one rate. At three other rates the
simulation's prediction is compared with what locust measured. The rates take turns, so that noise hits all of them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.service.load import send
from benchmarks.service.processes import running_service
from benchmarks.service.redis_memory import bytes_per_user, users_seen
from benchmarks.service.simulation import Outcome, ServiceTimes, Setting, simulate
from serving.bundle import Bundle

RESULT = ROOT / "benchmarks/results/capacity.json"
MAX_ERROR = 0.2  # relative; a prediction that is further off does not hold
TARGETS = (1_000, 10_000, 400_000)  # requests a second
ALL_USERS = 1_000_000_000
STATE_TTL = 3600  # seconds, the service's own default
REPEATS = 5  # simulations of one case, each with its own seed


def main() -> None:
    parser = argument_parser("benchmarks.service.capacity", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--measure", type=int, default=12, help="requests a second at which service times are measured")
    parser.add_argument("--rates", type=numbers, default=[6, 18, 24], help="requests a second to predict")
    parser.add_argument("--seconds", type=float, default=5, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=16, help="turns per rate")
    parser.add_argument("--p99-ms", type=float, default=250, help="longest p99 that the plan allows")
    parser.add_argument("--replica-hour", type=float, default=0.04, help="price of one replica for an hour")
    parser.add_argument("--load", type=numbers, help="only predict these rates from the last measurement")
    parser.add_argument("--replicas", type=int, default=1, help="replicas for --load")
    parser.add_argument("--out", type=result_file, default=RESULT)
    options = parser.parse_args()
    if options.load:
        costs = from_json(json.loads(RESULT.read_text())["costs"])
        rows = [predict(costs, rate, options.replicas, options.replica_hour) for rate in options.load]
        print(table(rows, list(rows[0])))
        return
    run = Run(parser, options)
    costs, checks = measure(options.bundle, options.measure, options.rates, options.seconds, options.rounds)
    print(table(checks, list(checks[0])), "\n")
    plan = plan_large_loads(costs, options.bundle, options.p99_ms, options.replica_hour)
    print(table(plan, list(plan[0])))
    holds = all(row["holds"] for row in checks)
    run.record(options.out, list(range(REPEATS)), checks, holds=holds, on_paper=plan, costs=to_json(costs))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# Measurement


def measure(
    bundle: Path, at: int, rates: Sequence[int], seconds: float, rounds: int
) -> tuple[ServiceTimes, list[dict[str, Any]]]:
    """Service times at one rate, and for the other rates the prediction made from them next to what locust measured."""
    every = [at, *rates]
    load = ["--rates", ",".join(str(rate) for rate in every), "--rounds", str(rounds), "--phase-seconds", str(seconds)]
    with running_service(bundle) as server:
        send(server.address, ["--rates", str(at), "--phase-seconds", "10"])  # the first requests warm up
        found = send(server.address, load)
    # The first turn of every round is the one measured; close the gaps between them, so that time runs on.
    measured = [
        one | {"at": one["at"] // (seconds * len(every)) * seconds + one["at"] % (seconds * len(every))}
        for one in found["answers"][str(at)]
    ]
    costs = replace(fit(measured), auto_steps=Bundle.load(bundle).worthwhile_steps)
    sent = {row["offered_per_s"]: row for row in found["rows"]}
    return costs, [check(costs, sent[rate], found["answers"][str(rate)], seconds * rounds) for rate in rates]


def fit(answers: Sequence[dict[str, Any]]) -> ServiceTimes:
    """Service times from answers. Answers that shared a batch report identical times for it, to the microsecond."""
    batches: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in answers:
        times = one["timings_ms"]
        shape = one["reasoning_steps"], one["beam_width"]
        batches[*shape, times["encode"], times["reason"], times["decode"]].append(one)
    steps = np.array([key[0] for key in batches])
    rows = np.array([key[1] * len(mates) for key, mates in batches.items()], dtype=float)
    misses = np.array([sum(one["cache"] == "miss" for one in mates) for mates in batches.values()], dtype=float)
    encode = np.array([key[2] for key in batches]) / 1000
    search = np.array([key[3] + key[4] for key in batches]) / 1000
    known = sorted(set(steps.tolist()))
    # One slope for all: the cost of a beam row hardly depends on the steps before it.
    solution = nonnegative(np.column_stack([*(steps == one for one in known), rows]).astype(float), search)
    encoded = encode > 0
    first, each = nonnegative(np.column_stack([np.ones(encoded.sum()), misses[encoded]]), encode[encoded])
    bases = {int(one): (float(base), float(solution[-1])) for one, base in zip(known, solution, strict=False)}
    typical = np.array([bases[step][0] for step in steps.tolist()]) + solution[-1] * rows
    typical += np.where(encoded, first + each * misses, 0)
    inside = ("queue", "encode", "reason", "decode")
    overhead = [(one["at"], (one["ms"] - sum(one["timings_ms"][s] for s in inside)) / 1000) for one in answers]
    at = [mates[0]["at"] for mates in batches.values()]
    noise = zip(at, ((encode + search) / typical).tolist(), strict=True)
    return ServiceTimes(bases, (float(first), float(each)), sorted(noise), sorted(overhead))


def nonnegative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with a non-negative solution."""
    from scipy.optimize import nnls

    solution: np.ndarray = nnls(matrix, wanted)[0]
    return solution


def check(
    costs: ServiceTimes, sent: dict[str, Any], answers: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """The prediction next to the measurement, for the rate that was really sent and as long."""
    predicted = simulated(costs, Setting(rate=sent["sent_per_s"], seconds=seconds, warm_up=0.0))
    row: dict[str, Any] = {"sent_per_s": sent["sent_per_s"], "answers": len(answers)}
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        row |= {name: sent[name], f"predicted_{name}": predicted[name]}
    row |= {"rejected": sent["rejected"], "predicted_rejected": predicted["rejected"]}
    off = max(abs(predicted[name] / sent[name] - 1) for name in ("p50_ms", "p99_ms"))
    return row | {"off": round(off, 3), "holds": off <= MAX_ERROR}


# Prediction


def simulated(costs: ServiceTimes, setting: Setting) -> dict[str, Any]:
    """One row from several simulations together."""
    runs = [simulate(costs, replace(setting, seed=seed)) for seed in range(REPEATS)]
    whole = Outcome(sum(run.sent for run in runs), [s for run in runs for s in run.seconds])
    whole.rejected, whole.busy = sum(run.rejected for run in runs), fmean(run.busy for run in runs)
    for run in runs:
        whole.cache += run.cache
        whole.batches += run.batches
    return whole.row()


def predict(costs: ServiceTimes, rate: float, replicas: int, price: float) -> dict[str, Any]:
    """What users would see under a load, and the price of a million answers."""
    found = simulated(costs, Setting(rate=rate, seconds=max(20.0, 2000 / rate), replicas=replicas))
    answered = rate * (1 - found["rejected"])
    million = round(1e6 / answered / 3600 * replicas * price, 4) if answered else None
    return {"rate": rate, "replicas": replicas, **found, "price_per_million": million}


def most_per_replica(costs: ServiceTimes, p99_ms: float) -> tuple[float, dict[str, Any]]:
    """The largest load of one replica that keeps p99 within bounds and refuses at most one request in a thousand, and
    its row.

    Nothing is cached: of a billion users behind thousands of replicas few return before their state expires.
    """
    best: tuple[float, dict[str, Any]] = (0.0, {})
    low, high = 0.0, 2 / costs.typical(0, 50)
    for _ in range(8):
        rate = (low + high) / 2
        row = simulated(costs, Setting(rate=rate, seconds=1500 / rate, memory_users=0))
        if row["p99_ms"] is not None and row["p99_ms"] <= p99_ms and row["rejected"] <= 0.001:
            low, best = rate, (rate, row)
        else:
            high = rate
    return best


def plan_large_loads(costs: ServiceTimes, bundle: Path, p99_ms: float, price: float) -> list[dict[str, Any]]:
    """Replicas and Redis for large loads. A tenth of the replicas may be missing at any time: rollouts, lost nodes."""
    most, row = most_per_replica(costs, p99_ms)
    if not most:
        raise SystemExit(f"One replica cannot keep a p99 of {p99_ms:g} ms here at any load; allow more with --p99-ms.")
    state, history = bytes_per_user(bundle)
    answers = []
    for rate in TARGETS:
        replicas = math.ceil(rate / most / 0.9)
        seen = users_seen(ALL_USERS, rate * STATE_TTL)
        answers.append(
            {
                "requests_per_s": rate,
                "per_replica": round(most, 1),
                "replicas": replicas,
                "p99_ms": row["p99_ms"],
                "users_in_an_hour": round(seen),
                "states_gb": round(seen * state / 1e9, 1),
                "histories_gb": round(ALL_USERS * history / 1e9, 1),
                "redis_gbit_per_s": round(2 * rate * state * 8 / 1e9, 2),
                "price_per_hour": round(replicas * price, 2),
            }
        )
    return answers


# The measurement as JSON


def to_json(costs: ServiceTimes) -> dict[str, Any]:
    """As stored in the result file."""
    return {
        "search": {str(steps): list(pair) for steps, pair in costs.search.items()},
        "encode": list(costs.encode),
        "auto_steps": list(costs.auto_steps),
        "noise": [[round(at, 2), round(value, 3)] for at, value in costs.noise],
        "overhead": [[round(at, 2), round(value, 5)] for at, value in costs.overhead],
    }


def from_json(text: dict[str, Any]) -> ServiceTimes:
    search = {int(steps): (pair[0], pair[1]) for steps, pair in text["search"].items()}
    noise, overhead = ([(at, value) for at, value in text[name]] for name in ("noise", "overhead"))
    auto_steps = tuple(text.get("auto_steps", ServiceTimes.auto_steps))  # an older measurement took any number
    return ServiceTimes(search, (text["encode"][0], text["encode"][1]), noise, overhead, auto_steps)


if __name__ == "__main__":
    main()
