"""What a cached encoder state saves: looking it up in this process or in a real Redis, compared with encoding again.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.cache

`encode_ms` encodes the histories of a batch; `memory_ms` and `redis_ms` look their states up in a tier as the service
does, all users of the batch at once. `memory_times` and `redis_times` are how many times faster that is, `memory_saves`
and `redis_saves` the share of a whole answer (encoding, and a search with 50 beams and no reasoning) that is saved;
below 0 a look-up costs more than it saves.

`ping_ms` is an empty round trip to that Redis: the part of `redis_ms` that network and other work on the machine cause.
Contenders take turns; figures are lower quartiles, for other work on the machine can only add time. The engine has one
thread, Redis a process of its own.

`float16` is the reason why states are kept as float32: how much scores, for all numbers of steps, change when states
are rounded to float16 first, against the 1e-4 by which a score may differ from its definition.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.sizes import random_bundle, size
from benchmarks.redis_server import redis_server
from serving.bundle import Bundle
from serving.engine import Engine
from serving.online.cache import StateCache
from serving.online.redis_link import RedisLink, connect
from serving.online.tiers import HEADER, MemoryTier, RedisTier
from serving.types import EncoderState, Request

SEED = 0
BEAM = 50
LENGTHS = (5, 20, 50)  # items of a history; those beyond a model's limit are left out
BATCHES = (1, 16)
WARM_UP = 2  # rounds
TIMEOUT = 10.0  # seconds: the cost of Redis is measured here, not bounded
COLUMNS = [
    "model", "history", "batch", "state_kb", "encode_ms", "memory_ms", "redis_ms", "ping_ms", "memory_times",
    "redis_times", "memory_saves", "redis_saves",
]  # fmt: skip
FLOAT16 = ["model", "histories", "scores", "largest", "mean", "above_1e-4"]

History = tuple[int, ...]
Work = Callable[[], Awaitable[Any]]


def main() -> None:
    parser = argument_parser("benchmarks.engine.cache", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--seconds", type=float, default=5, help="time for all turns of one row")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/cache.json")
    options = parser.parse_args()
    run = Run(parser, options)
    demo = Bundle.load(options.bundle)
    engines = {f"demo, {size(demo)}": Engine(demo), "random, 5M": Engine(random_bundle())}
    with redis_server() as url:
        measured = [asyncio.run(measure(name, engine, url, options.seconds)) for name, engine in engines.items()]
    rows = [row for of_one_model in measured for row in of_one_model]
    rounding = [float16_error(name, engine) for name, engine in engines.items()]
    print(table(rows, COLUMNS) + "\n\n" + table(rounding, FLOAT16))
    run.record(options.out, [SEED], rows, float16=rounding)


async def measure(name: str, engine: Engine, url: str, seconds: float) -> list[dict[str, Any]]:
    """One row per history length and batch size."""
    client = connect(url)
    rng, rows = np.random.default_rng(SEED), []
    for length, batch in [(n, b) for n in LENGTHS if n <= engine.bundle.max_items for b in BATCHES]:
        histories = [tuple(rng.integers(0, len(engine.bundle.catalogue), length).tolist()) for _ in range(batch)]
        states = engine.encode(histories)
        memory = StateCache(MemoryTier(batch, 1 << 30, 3600), None)
        link = RedisLink(client, TIMEOUT)
        redis = StateCache(None, RedisTier(link, link, 3600, 1 << 24))
        for cache in (memory, redis):
            await keep(cache, histories, states)
        work = contenders(engine, histories, states, memory, redis) | {"ping": partial(link.execute_pipelined, "PING")}
        times = await in_turns(work, seconds)
        size = round((states[0].nbytes + HEADER.size) / 1000, 1)
        rows.append({"model": name, "history": length, "batch": batch, "state_kb": size, **figures(times)})
    await client.aclose()
    return rows


def contenders(
    engine: Engine, histories: Sequence[History], states: Sequence[EncoderState], memory: StateCache, redis: StateCache
) -> dict[str, Work]:
    requests = [Request(history, 10, BEAM, 0) for history in histories]

    async def encode() -> None:
        engine.encode(histories)

    async def search() -> None:
        engine.search(requests, states)

    return {
        "encode": encode,
        "memory": partial(find, memory, histories, "memory"),
        "redis": partial(find, redis, histories, "redis"),
        "search": search,
    }


def figures(ms: dict[str, float]) -> dict[str, float]:
    """The figures of a row, from milliseconds by contender."""
    answer = ms["encode"] + ms["search"]
    tiers = ("memory", "redis")
    return {
        **{f"{contender}_ms": round(ms[contender], 3) for contender in ("encode", *tiers, "ping", "search")},
        **{f"{tier}_times": round(ms["encode"] / ms[tier], 1) for tier in tiers},
        **{f"{tier}_saves": round((ms["encode"] - ms[tier]) / answer, 3) for tier in tiers},
    }


async def in_turns(work: dict[str, Work], seconds: float) -> dict[str, float]:
    """Milliseconds (lower quartile) of each, in turns for so many seconds; the first rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    until, turn = time.perf_counter() + seconds, 0
    while turn < WARM_UP + 8 or time.perf_counter() < until:
        for name, run in work.items():
            begin = time.perf_counter()
            await run()
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - begin) * 1000)
        turn += 1
    return {name: float(np.percentile(values, 25)) for name, values in times.items()}


async def keep(cache: StateCache, histories: Sequence[History], states: Sequence[EncoderState]) -> None:
    """Stores a state per history, and waits until all are written."""
    for user, (history, state) in enumerate(zip(histories, states, strict=True)):
        lookup = await cache.get(str(user), f"{len(history)}", history)
        lookup.flight.state = state
        cache.put(lookup)
    await cache.close()


async def find(cache: StateCache, histories: Sequence[History], source: str) -> None:
    found = await asyncio.gather(*(cache.get(str(i), f"{len(h)}", h) for i, h in enumerate(histories)))
    if any(lookup.source != source for lookup in found):
        raise RuntimeError(f"A state was evicted from {source}; run again on a machine with more memory.")


def float16_error(name: str, engine: Engine, histories: int = 20) -> dict[str, Any]:
    """How much scores change when states are rounded to float16, where the reasoning tokens stay the same."""
    rng, changes = np.random.default_rng(SEED), []
    bundle = engine.bundle
    for _ in range(histories):
        history = tuple(rng.integers(0, len(bundle.catalogue), rng.integers(1, bundle.max_items + 1)).tolist())
        (state,) = engine.encode([history])
        rounded = EncoderState(state.hidden.astype(np.float16).astype(np.float32))
        for steps in range(bundle.max_steps + 1):
            request = Request(history, BEAM, BEAM, steps, explain=True)
            (exact,), (rough,) = engine.search([request], [state]), engine.search([request], [rounded])
            if exact.trace and rough.trace and exact.trace.reasoning_tokens == rough.trace.reasoning_tokens:
                scores = dict(zip(rough.items, rough.scores, strict=True))
                both = zip(exact.items, exact.scores, strict=True)
                changes += [abs(score - scores[item]) for item, score in both if item in scores]
    return {
        "model": name,
        "histories": histories,
        "scores": len(changes),
        "largest": round(max(changes), 6),
        "mean": round(statistics.mean(changes), 6),
        "above_1e-4": round(sum(error > 1e-4 for error in changes) / len(changes), 3),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
