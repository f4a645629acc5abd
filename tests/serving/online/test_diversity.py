"""The order of a diverse list against its definition in plain Python, and the limit per category."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.online.diversity import choose
from tests.builders import tiny_model


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_model()


def by_definition(bundle: Bundle, items: list[int], scores: list[float], k: int, diversity: float) -> list[int]:
    vectors = bundle.unit_vectors(items).astype(np.float64)
    relevance = [(score - scores[-1]) / (scores[0] - scores[-1]) for score in scores]
    chosen = [0]
    while len(chosen) < k:
        left = [i for i in range(len(items)) if i not in chosen]
        closest = {i: max(float(vectors[i] @ vectors[j]) for j in chosen) for i in left}
        chosen.append(max(left, key=lambda i: (1 - diversity) * relevance[i] - diversity * closest[i]))
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.7, 1.0])
def test_maximal_marginal_relevance(bundle: Bundle, diversity: float) -> None:
    items = np.random.default_rng(1).permutation(60)[:30].tolist()
    scores = (-np.sort(np.random.default_rng(2).gamma(2.0, 2.0, 30))).tolist()
    found = choose(bundle, items, scores, 12, diversity, None)
    assert found == by_definition(bundle, items, scores, 12, diversity)
    assert (found == list(range(12))) == (diversity == 0)


def test_a_more_diverse_list_has_items_less_alike(bundle: Bundle) -> None:
    def likeness(diversity: float) -> float:
        rows = choose(bundle, list(range(40)), [-0.1 * row for row in range(40)], 10, diversity, None)
        vectors = bundle.unit_vectors(rows)
        return float((vectors @ vectors.T - np.eye(10)).max(1).mean())

    assert likeness(1.0) < likeness(0.5) < likeness(0.0)


def test_no_category_has_more_than_its_part(bundle: Bundle) -> None:
    """Even and odd rows have a category each; one item has both, and one has none."""
    categories = bundle.catalogue.categories
    before = categories[2], categories[9]
    categories[2], categories[9] = ["even", "odd"], []
    try:
        scores = [float(-rank) for rank in range(12)]
        assert choose(bundle, list(range(12)), scores, 12, 0.0, 2) == [0, 1, 2, 9]
        assert choose(bundle, list(range(12)), scores, 3, 0.0, 2) == [0, 1, 2]
        assert choose(bundle, list(range(12)), scores, 12, 0.0, None) == list(range(12))
        assert sorted(choose(bundle, list(range(12)), scores, 12, 1.0, 100)) == list(range(12))
    finally:
        categories[2], categories[9] = before


def test_the_last_slots_are_for_new_items_as_long_as_there_are_too_few(bundle: Bundle) -> None:
    """Rows 4, 12 and 13 are new; the best scores come first."""
    popularity, scores = bundle.catalogue.popularity, [float(-rank) for rank in range(14)]
    before = popularity.copy()
    popularity += 1
    popularity[[4, 12, 13]] = 0
    try:

        def chosen(k: int, explore: int, **more: Any) -> list[int]:
            return choose(bundle, list(range(14)), scores, k, **{"diversity": 0.0, "max_per_category": None} | more,
                          explore=explore)  # fmt: skip

        assert chosen(6, 0) == chosen(6, 1) == [0, 1, 2, 3, 4, 5]  # one is there by its score
        assert chosen(6, 2) == [0, 1, 2, 3, 4, 12]
        assert chosen(6, 3) == chosen(6, 6) == [0, 1, 2, 4, 12, 13]
        assert chosen(2, 2) == [4, 12]
        assert chosen(14, 9) == list(range(14))
        assert chosen(6, 3, max_per_category=3) == [0, 1, 2, 4, 3, 13]  # 12 would be the fourth even row
        diverse = chosen(6, 2, diversity=1.0)
        assert diverse[0] == 0 and len(set(diverse)) == 6 and len({4, 12, 13} & set(diverse)) >= 2
    finally:
        popularity[:] = before


def test_few_items_are_all_chosen_and_none_is_none(bundle: Bundle) -> None:
    assert choose(bundle, [], [], 5, 0.5, 1) == []
    assert choose(bundle, [7], [-3.0], 5, 0.5, None) == [0]
    assert choose(bundle, [7, 8], [-3.0, -3.0], 5, 0.0, None) == [0, 1]
