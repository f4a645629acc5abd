"""The catalogue: the check of a few rows against the definition of what is permitted, and the search over titles."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.catalogue import Catalogue
from serving.types import Rules

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


def catalogue(titles: list[str | None] | None = None) -> Catalogue:
    titles = titles or [None] * ITEMS
    return Catalogue(
        item_ids=[f"i{row}" for row in range(len(titles))],
        tokens=np.arange(len(titles), dtype=np.int32)[:, None],
        titles=titles,
        categories=[["even"] if row % 2 == 0 else ["odd"] for row in range(len(titles))],
        popularity=np.arange(len(titles), dtype=float),
        subsets={"small": np.array([1, 4, 5, 4]), "none": np.array([], dtype=np.int64)},
    )


@settings(deadline=None)
@given(items=st.lists(st.integers(-2, ITEMS + 1), max_size=30), rules=rules)
def test_permitted_indices_agree_with_the_definition(items: list[int], rules: Rules) -> None:
    shop = catalogue()
    permitted = set(np.flatnonzero(shop.permitted(rules)).tolist())
    expected = [index for index, row in enumerate(items) if row in permitted and row not in items[:index]]
    assert shop.permitted_indices(items, rules) == expected


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
