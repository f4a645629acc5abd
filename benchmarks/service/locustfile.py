"""Load for a running service, by locust: `make load`, or with locust's page
`python -m locust -f benchmarks/service/locustfile.py --host http://127.0.0.1:8000`.

It is an open loop: each of locust's users is a Poisson source of one request a second that never waits for an answer,
for every request runs in a greenlet of its own. So locust's number of users is the rate in requests a second, and a
slow service is sent no less. (Locust's own pacing, `constant_throughput`, waits for answers that are slower than its
pace, which hides an overload.) Two bounds remain: `IN_FLIGHT` requests per source, and the one core of this process;
the report has the rate that was sent as well as the rate that was offered.
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

from benchmarks.quantiles import rounded
from benchmarks.service.traffic import Phase, Traffic, body, phase_at, profile, turns

IN_FLIGHT = 100
REJECTED = (429, 503, 504)  # the service's own "not now"; anything else but 200 is a failure


class Run:
    """The state of one test: its phases, its traffic, the number of requests in flight, and their answers."""

    phases: list[Phase] = []
    traffic: Traffic
    items: list[str] = []
    categories: list[str] = []
    in_flight = 0
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    statuses: dict[str, Counter[int]] = defaultdict(Counter)
    ready = False  # locust calls the shape before the test has started
    began = 0.0
    phase: Phase | None = None
    phase_began = 0.0
    seconds: dict[str, float] = defaultdict(float)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    group = parser.add_argument_group("streamrec")
    group.add_argument("--rate", type=int, default=20, help="requests a second of the steady phase (%(default)s)")
    group.add_argument("--phase-seconds", type=float, default=10, help="length of a phase; the steady one takes two")
    group.add_argument("--rates", default="", help="instead of these phases: rates in turns, such as 10,20,30")
    group.add_argument("--rounds", type=int, default=1, help="turns of each of --rates")
    group.add_argument("--shoppers", type=int, default=5000, help="users, who visit by Zipf's law")
    group.add_argument("--p99-ms", type=float, default=250, help="longest p99 of the steady phase that passes")
    group.add_argument("--error-share", type=float, default=0.01, help="largest share without an answer that passes")
    group.add_argument("--seed", type=int, default=0, help="seed of arrivals and requests")
    group.add_argument("--report", default="", help="JSON file to write the report to")


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    random.seed(options.seed)
    Run.phases = profile(options.rate, options.phase_seconds)
    if options.rates:
        Run.phases = turns([int(rate) for rate in options.rates.split(",")], options.rounds, options.phase_seconds)
    for collected in (Run.answers, Run.statuses, Run.seconds):
        collected.clear()
    Run.items = [item["item_id"] for item in fetch(environment.host, "/items?limit=100")["items"]]
    Run.categories = fetch(environment.host, "/models")["models"][0]["categories"]
    Run.traffic = Traffic(options.shoppers, len(Run.items), seed=options.seed)
    Run.ready, Run.began = True, time.perf_counter()


def fetch(host: str, path: str) -> Any:
    with urllib.request.urlopen(host.rstrip("/") + path, timeout=30) as answer:
        return json.load(answer)


class Source(FastHttpUser):
    """Sends one request a second on average, at times that do not depend on the answers."""

    concurrency = IN_FLIGHT
    max_retries = 1  # a pooled connection may have been closed by the server; the second attempt opens a new one

    def wait_time(self) -> float:
        return random.expovariate(1.0)

    def on_start(self) -> None:
        time.sleep(self.wait_time())  # else all sources of a phase would send their first request at once

    @task
    def arrive(self) -> None:
        if Run.phase is not None:
            # Locust has turned Python's threads into greenlets.
            threading.Thread(target=send_counted, args=(self.client, Run.phase.name), daemon=True).start()


def send_counted(client: Any, phase: str) -> None:
    Run.in_flight += 1
    try:
        send(client, phase)
    finally:
        Run.in_flight -= 1


def send(client: Any, phase: str) -> None:
    request = Run.traffic.next()
    query, sent = body(request, Run.items, Run.categories)
    path = f"/recommend?reasoning_steps={query['reasoning_steps']}"
    began = time.perf_counter()
    with client.post(path, json=sent, name=f"/recommend steps={request.steps}", catch_response=True) as response:
        seconds = time.perf_counter() - began
        Run.statuses[phase][response.status_code] += 1
        if response.status_code == 200:
            found = response.json()
            kept = {name: found[name] for name in ("reasoning_steps", "beam_width", "cache", "timings_ms")}
            Run.answers[phase].append(kept | {"at": began - Run.began, "ms": 1000 * seconds})
        elif response.status_code in REJECTED:
            response.failure(f"rejected: {response.json()['type'].rpartition(':')[2]}")
        else:
            response.failure(f"status {response.status_code}")


class Shape(LoadTestShape):
    """The number of locust's users, that is the rate in requests a second, over time."""

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


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def report(environment: Any, **_: Any) -> None:
    Run.ready = False
    patience = time.perf_counter() + 15
    while Run.in_flight and time.perf_counter() < patience:
        time.sleep(0.02)
    options = environment.parsed_options
    rows = [row(phase) for phase in {phase.name: phase for phase in Run.phases if phase.name in Run.seconds}.values()]
    faults = judge(rows, options.p99_ms, options.error_share)
    environment.process_exit_code = 1 if faults else 0
    if options.report:
        Path(options.report).write_text(json.dumps({"rows": rows, "failed": faults, "answers": Run.answers}))


def row(phase: Phase) -> dict[str, Any]:
    """The figures of a phase; a request belongs to the phase in which it was sent. Times are milliseconds."""
    statuses, times = Run.statuses[phase.name], [one["ms"] for one in Run.answers[phase.name]]
    sent, seconds = sum(statuses.values()), Run.seconds[phase.name]
    rejected = sum(statuses[status] for status in REJECTED)
    return {
        "phase": phase.name,
        "offered_per_s": phase.rate,
        "sent_per_s": round(sent / seconds, 2),
        "sent": sent,
        **{f"p{percent}_ms": rounded(times, percent / 100) for percent in (50, 95, 99)},
        "rejected": round(rejected / max(1, sent), 4),
        "failed": round((sent - rejected - statuses[200]) / max(1, sent), 4),
        "cached": round(sum(one["cache"] != "miss" for one in Run.answers[phase.name]) / max(1, len(times)), 4),
        "judged": phase.judged,
    }


def judge(rows: list[dict[str, Any]], p99_ms: float, error_share: float) -> list[str]:
    """Why the run does not pass; empty where it does. Rejections count in the steady phase alone, for in a spike they
    keep the other answers fast; failures count in every phase."""
    faults = []
    for found in rows:
        lost = found["failed"] + (found["rejected"] if found["judged"] else 0)
        if lost > error_share:
            faults.append(f"{found['phase']}: {lost:.1%} of the requests got no answer, the limit is {error_share:.1%}")
        if found["judged"] and (found["p99_ms"] is None or found["p99_ms"] > p99_ms):
            faults.append(f"{found['phase']}: p99 is {found['p99_ms']} ms, the limit is {p99_ms} ms")
    return faults or ([] if rows else ["no phase was completed"])
