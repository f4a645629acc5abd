"""The catalogue: the check of a few rows against the definition of what is permitted, and the search over titles."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import UnknownCatalogue
from serving.items.catalogue import WALKED, Catalogue
from serving.types import Boost, Rules

ITEMS = 12
rows = st.lists(st.integers(0, ITEMS - 1), max_size=8).map(tuple)
rules = st.builds(
    Rules,
    exclude=rows,
    deny=rows,
    allow=st.none() | rows,
    categories=st.sampled_from([(), ("even",), ("odd",), ("even", "odd")]),
    catalogue=st.sampled_from([None, "small", "none"]),
)


def catalogue(titles: list[str | None] | None = None, popularity: list[float] | None = None) -> Catalogue:
    titles = titles or [None] * ITEMS
    return Catalogue(
        item_ids=[f"i{row}" for row in range(len(titles))],
        tokens=np.arange(len(titles), dtype=np.int32)[:, None],
        titles=titles,
        categories=[["even"] if row % 2 == 0 else ["odd"] for row in range(len(titles))],
        popularity=np.arange(len(titles), dtype=float) if popularity is None else np.array(popularity),
        subsets={"small": np.array([1, 4, 5, 4]), "none": np.array([], dtype=np.int64)},
    )


@settings(deadline=None)
@given(items=st.lists(st.integers(-2, ITEMS + 1), max_size=30), rules=rules)
def test_permitted_indices_agree_with_the_definition(items: list[int], rules: Rules) -> None:
    shop = catalogue()
    permitted = set(np.flatnonzero(shop.permitted(rules)).tolist())
    expected = [index for index, row in enumerate(items) if row in permitted and row not in items[:index]]
    assert shop.permitted_indices(items, rules) == expected


def sorted_whole(shop: Catalogue, k: int, rules: Rules, boosts: list[Boost]) -> list[int]:
    """By one stable sort of all items, which is what popular means."""
    every = np.arange(len(shop))
    order = np.argsort(-(shop.popularity * np.exp(shop.log_factors(boosts, every))), kind="stable")
    return [int(row) for row in order if shop.permitted(rules)[row]][:k]


@settings(deadline=None, max_examples=200)
@given(
    popularity=st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 6.0]), min_size=ITEMS, max_size=ITEMS),
    added=st.integers(0, 4),
    unlisted=st.sets(st.integers(0, ITEMS - 1), max_size=4),
    k=st.integers(0, ITEMS + 5),
    rules=rules,
    factors=st.lists(st.tuples(st.sampled_from(["size < 4", "size >= 2"]), st.sampled_from([0.5, 2.0])), max_size=2),
    walked=st.sampled_from([0, 3, 8, 100]),
    at_once=st.sampled_from([1, 3, 100]),
)
def test_popular_items_are_those_of_a_stable_sort_of_all(
    popularity: list[float],
    added: int,
    unlisted: set[int],
    k: int,
    rules: Rules,
    factors: list[tuple[str, float]],
    walked: int,
    at_once: int,
) -> None:
    """Equally popular ones in the order of their rows, however few of them are looked at first."""
    shop = catalogue(popularity=popularity)
    for row in range(ITEMS):
        shop.describe(row, None, shop.categories[row], {"size": row % 6})
    for number in range(added):  # nobody has seen these
        shop.add(f"new {number}", [ITEMS + number], None, ["even"], {"size": number})
    for row in unlisted:
        shop.list_item(row, False)
    boosts = [shop.boost(text, factor, 0.0) for text, factor in factors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.catalogue.WALKED", walked)
        patch.setattr("serving.items.catalogue.AT_ONCE", at_once)
        assert shop.popular(k, rules, boosts) == sorted_whole(shop, k, rules, boosts)
        at_once_found = shop.popular_at_once(k, rules)
        assert at_once_found in (None, sorted_whole(shop, k, rules, []))
        assert at_once_found is not None or (walked < ITEMS or added)


def test_the_most_popular_items_tell_without_a_pass_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 5 * WALKED
    shop = catalogue([None] * count)
    monkeypatch.setattr(Catalogue, "permitted", lambda *_: pytest.fail("a pass over the whole catalogue"))
    everything = list(range(count))[::-1]
    assert shop.popular(10, Rules(exclude=(count - 1, count - 4))) == [*everything[1:3], *everything[4:12]]
    assert shop.popular(3, Rules(categories=("even",))) == everything[1:6:2]
    assert shop.popular_at_once(WALKED, Rules()) == everything[:WALKED]
    for k, rules in ((WALKED + 1, Rules()), (1, Rules(catalogue="small"))):
        assert shop.popular_at_once(k, rules) is None
    with pytest.raises(UnknownCatalogue):
        shop.popular_at_once(1, Rules(catalogue="never"))


def test_titles_match_on_every_word_in_any_case_most_popular_first() -> None:
    shop = catalogue(["Red Shoe", "red hat", None, "Shoe, dark RED", "blue shoe"])
    assert shop.find_titles("shoe rEd", 10) == [3, 0]
    assert shop.find_titles("red", 2) == [3, 1]
    assert shop.find_titles("", 10) == [4, 3, 2, 1, 0]
    assert shop.find_titles("green", 10) == []


def test_rows_that_change_while_they_are_counted_are_there_or_not() -> None:
    """An index with more room is built on another thread than the one that takes items off the list."""
    shop, done = catalogue([None] * 200_000), threading.Event()

    def change() -> None:
        while not done.is_set():
            for row in range(0, len(shop), 100):
                shop.listed[row] = not shop.listed[row]

    changing = threading.Thread(target=change)
    changing.start()
    try:
        found = [shop.listed_rows() for _ in range(400)]
    finally:
        done.set()
        changing.join()
    assert all((np.diff(rows) > 0).all() for rows in found)
