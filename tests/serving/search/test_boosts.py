"""Boosts inside the search against scores without them, to which their logs are added."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import RequestError
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.types import MAX_BOOSTS, Boost, Request, Rules
from tests.builders import GATE, tiny_model
from tests.serving.items.test_filters import NOW, shop

TEXTS = ('categories has "even"', "price < 5", "price >= 8", 'not categories has "odd"', "nobody == 1")
HISTORY = (3, 4, 5)


def with_prices(bundle: Bundle) -> Bundle:
    catalogue = bundle.catalogue
    for row in range(len(catalogue)):
        catalogue.describe(row, catalogue.titles[row], catalogue.categories[row], {"price": float(row % 10)})
    return bundle


def boosts(bundle: Bundle, *factors: float) -> tuple[Boost, ...]:
    return tuple(bundle.catalogue.boost(text, factor, NOW) for text, factor in zip(TEXTS, factors, strict=False))


def scores(engine: Engine, *requests: Request) -> list[dict[int, float]]:
    answers = engine.search(requests, engine.encode([request.history for request in requests]))
    for answer in answers:
        assert answer.scores == sorted(answer.scores, reverse=True)
    return [dict(zip(answer.items, answer.scores, strict=True)) for answer in answers]


@pytest.mark.parametrize("options", [
    {}, {"dense_weight": 0.4, "dense_candidates": 9, "paths": 2},
    {"neighbours": True, "neighbours_weight": 0.7, "dense_candidates": 9},
    {"neighbours": True, "neighbours_weight": 0.7, "dense_candidates": 9, "gate": GATE},
], ids=["network", "dense", "memory added", "memory mixed"])  # fmt: skip
def test_the_log_of_the_factor_is_added_to_every_score(options: dict[str, Any]) -> None:
    """With beams for all items. The items of a request that boosts nothing have the scores they have alone."""
    bundle = with_prices(tiny_model(**options))
    engine, whole = Engine(bundle), Request(HISTORY, 60, 60, 2, Rules(exclude=(7, 8)))
    [plain] = scores(engine, whole)
    for factors in ((4.0,), (0.1, 3.0), (50.0, 0.2, 0.001, 2.0)):
        own = boosts(bundle, *factors)
        without, found = scores(engine, whole, replace(whole, boosts=own))
        assert without == pytest.approx(plain, abs=1e-5) and len(found) == 58
        added = bundle.catalogue.log_factors(own, sorted(plain)).tolist()
        assert any(added) and all(any(math.isclose(each, x, abs_tol=1e-9) for x in sums(factors)) for each in added)
        expected = {row: plain[row] + more for row, more in zip(sorted(plain), added, strict=True)}
        assert found == pytest.approx(expected, abs=1e-4)
        ranked = scores(engine, replace(whole, items=(9, 10, 11), boosts=own))[0]
        assert ranked == pytest.approx({row: expected[row] for row in (9, 10, 11)}, abs=1e-4)


def sums(factors: tuple[float, ...]) -> set[float]:
    found = {0.0}
    for factor in factors:
        found |= {each + math.log(factor) for each in found}
    return found


def test_a_narrow_beam_finds_what_is_boosted() -> None:
    """The best that a wide beam finds, though without the boost a narrow one would never reach it."""
    bundle = with_prices(tiny_model(step_form="token"))
    engine, narrow = Engine(bundle), Request(HISTORY, 3, 3, 0)
    [plain] = scores(engine, replace(narrow, k=60, beam_width=60))
    rare = min(plain, key=lambda row: plain[row])
    bundle.catalogue.describe(rare, "", [], {"rare": True})
    up = (bundle.catalogue.boost("rare == true", 1000.0, NOW), bundle.catalogue.boost("rare == true", 1000.0, NOW))
    assert rare not in scores(engine, narrow)[0] and next(iter(scores(engine, replace(narrow, boosts=up))[0])) == rare
    best = next(iter(scores(engine, narrow)[0]))
    bundle.catalogue.describe(best, "", [], {"old": True})
    down = (bundle.catalogue.boost("old == true", 0.001, NOW),)
    assert best not in scores(engine, replace(narrow, boosts=down))[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.lists(st.sampled_from([0.2, 0.5, 3.0]), min_size=1, max_size=4))
def test_the_bound_of_a_node_is_reached_or_above_what_any_item_below_gets(
    seed: int, count: int, factors: list[float]
) -> None:
    catalogue = shop(count, seed)
    trie = build_trie(catalogue.tokens, table_entries=20)
    book = RuleBook(trie, catalogue.sets)
    own = tuple(catalogue.boost(text, factor, NOW) for text, factor in zip(TEXTS, factors, strict=False))
    found = book.boosts([(), own])
    assert found is not None
    leaves = np.arange(count)
    by_row = catalogue.log_factors(own, trie.item.numpy())
    of_leaves = found.of_leaves(torch.from_numpy(leaves).expand(2, -1)).numpy()
    np.testing.assert_allclose(of_leaves, [np.zeros(count), by_row], atol=1e-6)
    single = len(own) == 1
    for level in range(trie.levels):
        parents = torch.arange(*trie.level_start[level : level + 2]).expand(2, -1)
        log_probs, child = trie.expand(torch.zeros(2, parents.shape[1], 100), parents, level)
        bound = found.of_children(child, level)
        assert not bound[0].any()
        for node, most in zip(child[1][log_probs[1] == 0].tolist(), bound[1][log_probs[1] == 0].tolist(), strict=True):
            below = [by_row[leaf] for leaf in leaves if node in ancestors(trie.parent, leaf + trie.level_start[-2])]
            assert most >= max(below) - 1e-6
            assert not single or most == pytest.approx(max(below))


def ancestors(parent: torch.Tensor, node: int) -> set[int]:
    found = {node}
    while node:
        node = int(parent[node])
        found.add(node)
    return found


def test_boosts_follow_items_as_they_change() -> None:
    bundle = with_prices(tiny_model())
    engine, [boost] = Engine(bundle), boosts(bundle, 5.0)
    request = Request(HISTORY, 60, 60, 1, boosts=(boost,))
    assert engine.adopt(engine.with_room()) == []
    [before] = scores(engine, request)
    bundle.catalogue.describe(6, None, ["odd"], {})
    bundle.catalogue.describe(9, None, ["even"], {})
    assert engine.refresh([6, 9]) == []
    [after] = scores(engine, request)
    moved = {row: after[row] - before[row] for row in after if abs(after[row] - before[row]) > 1e-4}
    assert moved == pytest.approx({6: -math.log(5), 9: math.log(5)}, abs=1e-4)


def test_more_boosts_than_there_is_room_for_are_searched_one_after_another() -> None:
    bundle = with_prices(tiny_model())
    plain, tight = Engine(bundle), Engine(bundle)

    def with_slots(slots: int) -> RuleBook:
        row = plain.rules.sets.bits.shape[1]
        books = (RuleBook(tight.trie, bundle.catalogue.sets, set_bytes=n * row) for n in range(1000))
        return next(book for book in books if len(book.sets) == slots)

    tight.rules = with_slots(1 + MAX_BOOSTS)
    own = [boosts(bundle, *factors) for factors in ((2.0, 3.0), (0.5, 0.2, 4.0, 3.0))]
    requests = [Request(HISTORY, 60, 60, 1, boosts=each) for each in own]
    requests += [Request(HISTORY, 60, 60, 1, Rules(filters=("price < 7.0",)))]
    for found, expected in zip(scores(tight, *requests), scores(plain, *requests), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    tight.rules = with_slots(MAX_BOOSTS)
    with pytest.raises(RequestError, match="too large for so many boosts"):
        scores(tight, *requests)
