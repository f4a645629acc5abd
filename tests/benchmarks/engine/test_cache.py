"""What the cache's benchmark says is what it measured: by hand, and over a small model and a real Redis."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.engine.cache import COLUMNS, figures, find, float16_error, keep, measure
from benchmarks.redis_server import redis_server
from serving.engine import Engine
from serving.online.cache import StateCache
from serving.online.tiers import MemoryTier
from serving.types import EncoderState
from tests.builders import tiny_model


def test_figures_by_hand() -> None:
    row = figures({"encode": 4.0, "memory": 1.0, "redis": 2.0, "ping": 0.5, "search": 4.0})
    assert (row["encode_ms"], row["memory_times"], row["redis_times"]) == (4.0, 4.0, 2.0)
    assert (row["memory_saves"], row["redis_saves"]) == (0.375, 0.25)


def test_every_row_is_measured_over_a_real_redis() -> None:
    with redis_server() as url:
        rows = asyncio.run(measure("tiny", Engine(tiny_model()), url, seconds=0.0))
    assert [(row["history"], row["batch"]) for row in rows] == [(5, 1), (5, 16)]  # it reads 6 items
    for row in rows:
        assert set(COLUMNS) <= row.keys() and row["state_kb"] == pytest.approx((15 * 16 * 4 + 44) / 1000, abs=0.05)
        assert all(row[f"{contender}_ms"] > 0 for contender in ("encode", "memory", "redis", "ping", "search"))


def test_a_miss_is_not_taken_for_a_hit() -> None:
    async def scenario() -> None:
        cache = StateCache(MemoryTier(10, 1 << 20, 60), None)
        await keep(cache, [(1, 2)], [EncoderState(np.zeros((2, 2), np.float32))])
        await find(cache, [(1, 2)], "memory")
        with pytest.raises(RuntimeError):
            await find(cache, [(2, 1)], "memory")

    asyncio.run(scenario())


def test_the_error_of_float16_is_that_of_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model())
    row = float16_error("tiny", engine, histories=3)
    assert 0 < row["mean"] < row["largest"] < 0.1 and row["scores"] > 0
    exact = engine.encode
    halves = lambda histories: [  # noqa: E731
        EncoderState(state.hidden.astype(np.float16).astype(np.float32)) for state in exact(histories)
    ]
    monkeypatch.setattr(engine, "encode", halves)
    assert float16_error("tiny", engine, histories=3)["largest"] == 0
