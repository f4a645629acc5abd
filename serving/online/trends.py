"""What is popular and what is trending, of a catalogue: from decayed counts of events, and the bundle's popularity.

    rise(i)     = (count(i) - expected(i)) / sqrt(expected(i) + 1)
    expected(i) = total * (before(i) + PRIOR * p(i)) / (total_before + PRIOR)

count and total are those of a window, before those of a month without it, p the item's share of the bundle's
popularity. So an item rises by its own measure, in the standard deviations that chance makes, and whether the shop is
busy does not matter. PRIOR is worth so many events: a service that has just started compares with the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from serving.items.catalogue import Catalogue
from serving.online.counters import Counters, Window
from serving.online.popular_items import PopularItems
from serving.types import Boost, Rules

PRIOR = 100.0  # events


class Ranked(NamedTuple):
    """Catalogue rows, best first, and their scores."""

    rows: list[int]
    scores: list[float]


async def popular(counters: Counters, catalogue: Catalogue, window: Window = "week") -> Ranked:
    """By events in the window; of equally many the one more popular in the bundle comes first."""
    found = await counters.read(window)
    rows, indices = _in_catalogue(catalogue, found.ids)
    return _ranked(catalogue, rows, found.counts[indices])


async def trending(counters: Counters, catalogue: Catalogue, window: Window = "day") -> Ranked:
    """By how far the events in the window are above what was to be expected; only items that are."""
    found = await counters.read(window)
    rows, indices = _in_catalogue(catalogue, found.ids)
    share = (catalogue.popularity[rows] + 1) / (catalogue.popularity.sum() + len(catalogue))
    expected = found.total * (found.before[indices] + PRIOR * share) / (found.total_before + PRIOR)
    rise = (found.counts[indices] - expected) / np.sqrt(expected + 1)
    return _ranked(catalogue, rows[rise > 0], rise[rise > 0])


def permitted(catalogue: Catalogue, ranked: Ranked, rules: Rules, k: int) -> Ranked:
    """The first k that rules permit."""
    indices = catalogue.first_permitted(ranked.rows, rules, k)
    return Ranked([ranked.rows[index] for index in indices], [ranked.scores[index] for index in indices])


def of_bundle(catalogue: Catalogue, rows: Sequence[int], boosts: Sequence[Boost] = ()) -> Ranked:
    """Rows with their popularity in the bundle, as boosts multiply it."""
    return Ranked([*rows], (catalogue.popularity[rows] * np.exp(catalogue.log_factors(boosts, rows))).tolist())


def boosted(catalogue: Catalogue, ranked: Ranked, boosts: Sequence[Boost]) -> Ranked:
    """The same items, in the order of what boosts make of their scores."""
    rows = np.array(ranked.rows, np.int64)
    return _ranked(catalogue, rows, np.array(ranked.scores) * np.exp(catalogue.log_factors(boosts, rows)))


async def filled(items: PopularItems, ranked: Ranked, rules: Rules, k: int) -> Ranked:
    """The first k that rules permit, and behind them, as far as k is not reached, what is most popular in the bundle,
    with a score of 0. Raises what `PopularItems.find` raises."""
    first = permitted(items.catalogue, ranked, rules, k)
    if len(first.rows) == k:
        return first
    others = await items.find(k - len(first.rows), replace(rules, exclude=(*rules.exclude, *first.rows)))
    return Ranked([*first.rows, *others], [*first.scores, *[0.0] * len(others)])


def _in_catalogue(catalogue: Catalogue, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the ids that the catalogue has, and the indices of these ids."""
    known = [(row, index) for index, row in enumerate(catalogue.rows(ids)) if row is not None]
    rows, indices = np.array(known, np.int64).reshape(-1, 2).T
    return rows, indices


def _ranked(catalogue: Catalogue, rows: np.ndarray, scores: np.ndarray) -> Ranked:
    order = np.lexsort((rows, -catalogue.popularity[rows], -scores))
    return Ranked(rows[order].tolist(), scores[order].tolist())
