"""Popular: most events. Trending: more than its own past and the bundle let expect."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from serving.items import catalogue
from serving.online import trends
from serving.online.counters import LocalCounters
from serving.online.popular_items import PopularItems
from serving.online.scans import CatalogueScans
from serving.online.trends import PRIOR, Ranked
from serving.types import Rules
from tests.builders import tiny_model

DAY = 86_400.0
CATALOGUE = tiny_model().catalogue


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_popular_goes_by_events_then_by_the_bundle() -> None:
    clock = Clock()
    local = LocalCounters(clock)
    for _ in range(3):
        local.add(["i7"])
    clock.now += 14 * DAY  # two weeks ago, an event counts e^-2 of one now
    local.add(["i1", "i2", "gone from the catalogue"])
    first, second = sorted((1, 2), key=lambda row: -CATALOGUE.popularity[row])
    found = asyncio.run(trends.popular(local, CATALOGUE))
    assert found.rows == [first, second, 7]
    assert found.scores == pytest.approx([1, 1, 3 * np.exp(-2)])


def test_trending_is_what_is_above_its_own_past() -> None:
    """i1 is always bought, i2 has just begun to be, i3 has stopped."""
    clock, rng = Clock(), np.random.default_rng(0)
    local = LocalCounters(clock)
    for hour in range(24 * 40):
        clock.now = 3600.0 * hour
        local.add(["i1"])
        if hour < 24 * 38:
            local.add(["i3", f"i{rng.integers(4, 60)}"])
        else:
            local.add(["i2", f"i{rng.integers(4, 60)}"])
    found = asyncio.run(trends.trending(local, CATALOGUE))
    rise = dict(zip(found.rows, found.scores, strict=True))
    assert found.rows[0] == 2 and rise[2] > 4 * max(score for row, score in rise.items() if row != 2)
    assert rise.get(1, 0) < 1 and 3 not in rise
    assert asyncio.run(trends.popular(local, CATALOGUE, "day")).rows[0] in (1, 2)


def test_a_service_that_has_just_started_compares_with_the_bundle() -> None:
    local = LocalCounters(Clock())
    common, rare = int(CATALOGUE.popularity.argmax()), int(CATALOGUE.popularity.argmin())
    local.add([CATALOGUE.item_ids[common], CATALOGUE.item_ids[rare]])
    found = asyncio.run(trends.trending(local, CATALOGUE))
    shares = (CATALOGUE.popularity + 1) / (CATALOGUE.popularity.sum() + 60)
    expected = 2 * PRIOR * shares / PRIOR
    assert found.rows == [rare, common]
    assert found.scores == pytest.approx([(1 - expected[row]) / np.sqrt(expected[row] + 1) for row in found.rows])


def test_rules_choose_of_what_is_ranked_and_of_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "AT_ONCE", 3)
    ranked = Ranked([5, 6, 8, 7, 9, 10, 2], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    rules = Rules(categories=("even",), deny=(8,))
    assert trends.permitted(CATALOGUE, ranked, rules, 2) == ([6, 10], [6.0, 2.0])
    assert trends.permitted(CATALOGUE, ranked, rules, 9) == ([6, 10, 2], [6.0, 2.0, 1.0])
    filled = asyncio.run(trends.filled(PopularItems(CATALOGUE, CatalogueScans()), ranked, rules, 5))
    assert filled.rows == [6, 10, 2, *CATALOGUE.popular(2, Rules(categories=("even",), deny=(8, 6, 10, 2)))]
    assert filled.scores == [6.0, 2.0, 1.0, 0.0, 0.0]
