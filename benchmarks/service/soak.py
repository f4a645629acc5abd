"""Ten minutes of everything at once: does the service grow? Memory, open files, tasks and threads, sampled throughout.

    python -m benchmarks.service.soak --minutes 10

A service with a real Redis gets recommendation requests of all kinds, batches, events, erasures, page views and
malformed requests; clients hang up, bursts exceed the queue, and now and then Redis stalls or drops every connection.
Caches are small enough to be full after the first minutes. The last quarter of the run is compared with the second:
memory by its median, counts by their lower quartile: requests in flight come and go, and for a moment after a fault of
Redis there are fewer connections. Exit status 1: something grew.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.plots import TEAL, drawing
from benchmarks.redis_server import redis_server
from benchmarks.service.processes import running_service


def lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


# Name here -> metric of the process, summary of a quarter of the run, and the largest increase that is no growth.
WATCHED: dict[str, tuple[str, Callable[[list[float]], float], float]] = {
    "rss_mb": ("process_resident_memory_bytes", statistics.median, 8.0),
    "open_files": ("process_open_fds", lower_quartile, 3.0),
    "tasks": ("streamrec_event_loop_tasks", lower_quartile, 3.0),
    "threads": ("streamrec_threads", lower_quartile, 1.0),
}
OPTIONS = "--memory-cache-users 300 --max-queue-ms 300 --max-body-bytes 200000 --quota 1000000/minute".split()
CLIENTS = 4
USERS = 5_000
SAMPLE_EVERY = 2.0  # seconds
STALL_EVERY = 40.0  # seconds between two faults of Redis


def main() -> int:
    parser = argument_parser("benchmarks.service.soak", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/soak.json")
    options = parser.parse_args()
    run = Run(parser, options)
    with redis_server() as redis, running_service(options.bundle, [*OPTIONS, "--redis-url", redis]) as server:
        samples, answers = asyncio.run(soak(server.address, redis, 60 * options.minutes))
    rows = growth(samples)
    print(table(rows, ["what", "second_quarter", "last_quarter", "growth", "allowed", "grew"]))
    print("\n" + table([{"status": status, "answers": count} for status, count in answers], ["status", "answers"]))
    run.record(options.out, [0], rows, answers=dict(answers), curve=samples)
    return 1 if any(row["grew"] for row in rows) or any(status == "500" for status, _ in answers) else 0


async def soak(address: str, redis: str, seconds: float) -> tuple[list[dict[str, float]], list[tuple[str, int]]]:
    """Runs the load. Returns the samples, and the number of answers by status (`gone`: the client hung up)."""
    answers: Counter[str] = Counter()
    until = time.monotonic() + seconds
    # Connections opened by a burst are closed again, else open files would count the client's pool.
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=10)
    async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as http:
        items = [item["item_id"] for item in (await http.get("/items", params={"limit": 100})).json()["items"]]
        watching = asyncio.create_task(watch(http, until))
        faults = asyncio.create_task(disturb(redis, until))
        await asyncio.gather(*(visit(http, items, answers, random.Random(n), until) for n in range(CLIENTS)))
        await faults
        return await watching, sorted(answers.items())


async def watch(http: httpx.AsyncClient, until: float) -> list[dict[str, float]]:
    samples, started = [], time.monotonic()
    while time.monotonic() < until:
        lines = (await http.get("/metrics")).text.splitlines()
        values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line[0] != "#"}
        sample = {name: values[metric] for name, (metric, _, _) in WATCHED.items()}
        sample["rss_mb"] = round(sample["rss_mb"] / 2**20, 2)
        requests = sum(value for name, value in values.items() if name.startswith("streamrec_request_seconds_count"))
        samples.append({"seconds": round(time.monotonic() - started, 1), **sample, "requests": requests})
        await asyncio.sleep(SAMPLE_EVERY)
    return samples


async def disturb(redis: str, until: float) -> None:
    """Makes Redis stall for two seconds and drop every connection, by turns."""
    turn = 0
    while time.monotonic() + STALL_EVERY < until:
        await asyncio.sleep(STALL_EVERY)
        turn += 1
        async with Redis.from_url(redis) as client:
            await (client.client_pause(2000) if turn % 2 else client.client_kill_filter(_type="normal", skipme=True))


async def visit(
    http: httpx.AsyncClient, items: list[str], answers: Counter[str], rng: random.Random, until: float
) -> None:
    """One client: one request after the other, of kinds drawn by weight."""
    names, weights = list(KINDS), [weight for _, weight in KINDS.values()]
    while time.monotonic() < until:
        (kind,) = rng.choices(names, weights)
        try:
            for response in await KINDS[kind][0](http, items, rng):
                answers[str(response.status_code)] += 1
        except httpx.TimeoutException:
            answers["gone"] += 1
        await asyncio.sleep(rng.uniform(0, 0.02))


Responses = Awaitable[list[httpx.Response]]


def body(items: list[str], rng: random.Random, **more: Any) -> dict[str, Any]:
    history = [rng.choice(items) for _ in range(rng.randrange(25))]
    return {"user_id": f"soak-{rng.randrange(USERS)}", "history": history, "k": rng.randint(1, 20)} | more


async def recommend(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    rules: dict[str, Any] = rng.choice(
        [{}, {}, {"explain": True}, {"deny": items[:20]}, {"allow": items}, {"beam_width": 100}]
    )
    steps = rng.choice(["0", "2", "4", "auto"])
    budget = {"timeout_ms": rng.choice([1, 50, 200])} if steps == "auto" else {}
    return [await http.post(f"/recommend?reasoning_steps={steps}", json=body(items, rng, **rules, **budget))]


async def batch(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    requests = [body(items, rng, k=rng.choice([0, 5, 10])) for _ in range(8)]
    return [await http.post("/recommend/batch", json={"requests": requests})]


async def user_data(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    user = f"soak-{rng.randrange(USERS)}"
    events = [await http.post(f"/users/{user}/events", json={"items": rng.choices(items, k=5)})]
    reads = [await http.post("/recommend", json={"user_id": user}), await http.get(f"/users/{user}")]
    return events + reads + ([await http.delete(f"/users/{user}")] if rng.random() < 0.5 else [])


async def browse(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    paths = [
        "/",
        "/page/script.js",
        "/docs",
        "/models",
        f"/items/{rng.choice(items)}",
        "/items?query=a",
        "/openapi.json",
    ]
    return [await http.get(rng.choice(paths))]


async def malformed(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    content = rng.choice([b"{", b"[]", b'{"k": 0}', b'{"history": ["' + b"x" * 300 + b'"]}', b" " * 200_001])
    headers = {"Content-Type": "application/json", "X-Request-ID": str(rng.random())}
    return [
        await http.post("/recommend", content=content, headers=headers),
        await http.get(f"/{rng.random()}"),
        await http.put("/models"),
    ]


async def hang_up(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    return [await http.post("/recommend", json=body(items, rng), timeout=rng.uniform(0.001, 0.02))]


async def burst(http: httpx.AsyncClient, items: list[str], rng: random.Random) -> list[httpx.Response]:
    requests = (http.post("/recommend", json=body(items, rng, beam_width=100, timeout_ms=500)) for _ in range(40))
    return list(await asyncio.gather(*requests))


KINDS: dict[str, tuple[Callable[[httpx.AsyncClient, list[str], random.Random], Responses], float]] = {
    "recommend": (recommend, 60),
    "batch": (batch, 4),
    "user data": (user_data, 10),
    "browse": (browse, 10),
    "malformed": (malformed, 8),
    "hang_up": (hang_up, 7),
    "burst": (burst, 1),
}


def growth(samples: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The watched quantities in the second and in the last quarter of the run."""
    quarter = len(samples) // 4
    rows = []
    for name, (_, summary, allowed) in WATCHED.items():
        before = summary([sample[name] for sample in samples[quarter : 2 * quarter]])
        after = summary([sample[name] for sample in samples[-quarter:]])
        rows.append(
            {
                "what": name,
                "second_quarter": before,
                "last_quarter": after,
                "growth": round(after - before, 2),
                "allowed": allowed,
                "grew": after - before > allowed,
            }
        )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """The curves, one below the other."""
    samples = result["curve"]
    labels = {"rss_mb": "memory, MB", "open_files": "open files", "tasks": "tasks", "threads": "threads"}
    minutes = [sample["seconds"] / 60 for sample in samples]
    with drawing(path, 8, 6) as figure:
        for axes, (name, label) in zip(figure.subplots(len(labels), 1, sharex=True), labels.items(), strict=True):
            values = [sample[name] for sample in samples]
            axes.plot(minutes, values, color=TEAL, linewidth=1.2)
            axes.set(ylabel=label, ylim=(0, 1.15 * max(values)))
            axes.grid(alpha=0.3)
        axes.set_xlabel(f"minutes; {samples[-1]['requests']:,.0f} requests in all")


if __name__ == "__main__":
    sys.exit(main())
