"""Load for a running service, by locust: `make load`, or with locust's page
`python -m locust -f benchmarks/service/locustfile.py --host http://127.0.0.1:8000`.

What is open about it: each of locust's users is a Poisson source of one request a second and never waits for an answer,
every request runs in a greenlet of its own. So locust's number of users reads as requests a second, and a service that
becomes slow is sent no less. (Locust's own pacing, `constant_throughput`, holds only while a user's answers come faster
than its pace; beyond that it waits, and hides the overload.) Two bounds are left: `IN_FLIGHT` requests of one source,
and this one process's core; the report says how much was sent beside what was asked.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from locust import FastHttpUser, LoadTestShape, events, task

from benchmarks.service.traffic import Phase, Traffic, body, phase_at, profile, turns

IN_FLIGHT = 100
REJECTED = (429, 503, 504)  # the service's own "not now"; anything else but 200 is a fault


class Run:
    """What one test shares: its phases, its traffic, the requests under way and what came of them."""

    phases: list[Phase] = []
    traffic: Traffic
    items: list[str] = []
    categories: list[str] = []
    flying = 0
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    statuses: dict[str, Counter[int]] = defaultdict(Counter)
    ready = False  # locust asks the shape before the traffic is there
    began = 0.0
    phase: Phase | None = None
    phase_began = 0.0
    seconds: dict[str, float] = defaultdict(float)


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    group = parser.add_argument_group("streamrec")
    group.add_argument("--rate", type=int, default=20, help="requests a second of the steady phase")
    group.add_argument("--phase-seconds", type=float, default=10, help="of a phase; the steady one takes two")
    group.add_argument("--rates", default="", help="instead of all that: these rates in turns, like 10,20,30")
    group.add_argument("--rounds", type=int, default=1, help="of --rates")
    group.add_argument("--shoppers", type=int, default=5000, help="users who visit, by Zipf's law")
    group.add_argument("--p99-ms", type=float, default=250, help="longest p99 of the steady phase that passes")
    group.add_argument("--error-share", type=float, default=0.01, help="largest share without an answer that passes")
    group.add_argument("--seed", type=int, default=0, help="of arrivals and requests")
    group.add_argument("--report", default="", help="file for what was measured, JSON")


@events.test_start.add_listener
def prepare(environment: Any, **_: Any) -> None:
    given = environment.parsed_options
    random.seed(given.seed)
    Run.phases = profile(given.rate, given.phase_seconds)
    if given.rates:
        Run.phases = turns([int(rate) for rate in given.rates.split(",")], given.rounds, given.phase_seconds)
    for kept in (Run.answers, Run.statuses, Run.seconds):
        kept.clear()
    Run.items = [item["item_id"] for item in fetch(environment.host, "/items?limit=100")["items"]]
    Run.categories = fetch(environment.host, "/models")["models"][0]["categories"]
    Run.traffic = Traffic(given.shoppers, len(Run.items), seed=given.seed)
    Run.ready, Run.began = True, time.perf_counter()


def fetch(host: str, path: str) -> Any:
    with urllib.request.urlopen(host.rstrip("/") + path, timeout=30) as answer:
        return json.load(answer)


class Source(FastHttpUser):
    """Sends one request a second on average, at times that know nothing of the answers."""

    concurrency = IN_FLIGHT
    max_retries = 1  # a kept connection may have been closed meanwhile; the second attempt opens a new one

    def wait_time(self) -> float:
        return random.expovariate(1.0)

    def on_start(self) -> None:
        time.sleep(self.wait_time())  # else all sources of a phase would begin with a common burst

    @task
    def arrive(self) -> None:
        if Run.phase is not None:
            # Locust has made greenlets of Python's threads.
            threading.Thread(target=fly, args=(self.client, Run.phase.name), daemon=True).start()


def fly(client: Any, phase: str) -> None:
    Run.flying += 1
    try:
        send(client, phase)
    finally:
        Run.flying -= 1


def send(client: Any, phase: str) -> None:
    ask = Run.traffic.next()
    query, sent = body(ask, Run.items, Run.categories)
    path = f"/recommend?reasoning_steps={query['reasoning_steps']}"
    began = time.perf_counter()
    with client.post(path, json=sent, name=f"/recommend steps={ask.steps}", catch_response=True) as response:
        seconds = time.perf_counter() - began
        Run.statuses[phase][response.status_code] += 1
        if response.status_code == 200:
            found = response.json()
            kept = {name: found[name] for name in ("reasoning_steps", "beam_width", "cache", "timings_ms")}
            Run.answers[phase].append(kept | {"at": began - Run.began, "ms": 1000 * seconds})
        elif response.status_code in REJECTED:
            response.failure(f"turned away: {response.json()['type'].rpartition(':')[2]}")
        else:
            response.failure(f"status {response.status_code}")


class Shape(LoadTestShape):
    """Locust's users, that is requests a second, over time."""

    def tick(self) -> tuple[int, float] | None:
        if not Run.ready:
            return 0, 1.0
        now = time.perf_counter()
        found = phase_at(Run.phases, now - Run.began)
        if found is not Run.phase:
            if Run.phase is not None:
                Run.seconds[Run.phase.name] += now - Run.phase_began
            Run.phase, Run.phase_began = found, now
        return None if found is None else (found.rate, 100.0)


@events.test_stop.add_listener
def report(environment: Any, **_: Any) -> None:
    Run.ready = False
    patience = time.perf_counter() + 15
    while Run.flying and time.perf_counter() < patience:
        time.sleep(0.02)
    given = environment.parsed_options
    rows = [row(phase) for phase in {phase.name: phase for phase in Run.phases if phase.name in Run.seconds}.values()]
    verdict = judge(rows, given.p99_ms, given.error_share)
    environment.process_exit_code = 1 if verdict else 0
    if given.report:
        Path(given.report).write_text(json.dumps({"rows": rows, "failed": verdict, "answers": Run.answers}))


def row(phase: Phase) -> dict[str, Any]:
    """What was measured in a phase; requests belong to the phase that they were sent in. Times are milliseconds."""
    statuses, times = Run.statuses[phase.name], sorted(one["ms"] for one in Run.answers[phase.name])
    sent, seconds = sum(statuses.values()), Run.seconds[phase.name]
    rejected = sum(statuses[status] for status in REJECTED)
    return {
        "phase": phase.name,
        "asked_per_s": phase.rate,
        "sent_per_s": round(sent / seconds, 2),
        "sent": sent,
        "p50_ms": quantile(times, 0.5),
        "p95_ms": quantile(times, 0.95),
        "p99_ms": quantile(times, 0.99),
        "rejected": round(rejected / max(1, sent), 4),
        "failed": round((sent - rejected - statuses[200]) / max(1, sent), 4),
        "cached": round(sum(one["cache"] != "miss" for one in Run.answers[phase.name]) / max(1, len(times)), 4),
        "judged": phase.judged,
    }


def quantile(ordered: list[float], share: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else None


def judge(rows: list[dict[str, Any]], p99_ms: float, error_share: float) -> list[str]:
    """Why the run does not pass. Turning away counts in the steady phase alone: in a spike it is what keeps the rest
    fast. A request that failed otherwise counts everywhere."""
    faults = []
    for found in rows:
        lost = found["failed"] + (found["rejected"] if found["judged"] else 0)
        if lost > error_share:
            faults.append(f"{found['phase']}: {lost:.1%} of the requests got no answer, {error_share:.1%} may")
        if found["judged"] and (found["p99_ms"] is None or found["p99_ms"] > p99_ms):
            faults.append(f"{found['phase']}: p99 is {found['p99_ms']} ms, {p99_ms} ms may be")
    return faults or ([] if rows else ["no phase came to its end"])
