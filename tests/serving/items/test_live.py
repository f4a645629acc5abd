"""A catalogue that changes: its trie and rules against those of a catalogue that was so from the beginning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.catalogue import Catalogue
from serving.items.live import LiveIndex
from serving.items.live_trie import LiveTrie, TrieFull
from serving.items.trie import TABLE_ENTRIES, Trie, build_trie
from serving.types import Rules
from tests.builders import random_codes
from tests.serving.items.test_rules import random_rules

SIZES = (5, 4, 11)
RANGES = ((3, 8), (8, 12), (12, 23))
FIRST = np.array([first for first, _ in RANGES])


class Shop:
    """A catalogue, and semantic IDs that nobody has yet."""

    def __init__(self, items: int, seed: int, levels: int) -> None:
        self.rng, self.levels = np.random.default_rng(seed), levels
        every = random_codes(int(np.prod(SIZES[:levels])), SIZES[:levels], seed) + FIRST[:levels]
        tokens, self.unused = every[:items].astype(np.int32), every[items:].tolist()
        self.catalogue = Catalogue(
            item_ids=[f"i{row}" for row in range(items)],
            tokens=tokens,
            titles=[None] * items,
            categories=[self.some_categories() for _ in range(items)],
            popularity=np.maximum(0.0, self.rng.permutation(items) - items // 4),
            subsets={"some": self.rng.integers(0, items, 7), "most": np.arange(0, items, 2), "none": np.arange(0)},
        )

    def some_categories(self) -> list[str]:
        return [name for name in "abc" if self.rng.random() < 0.4] or ["rest"]

    def change(self) -> int:
        """A random change; returns the row."""
        catalogue, kind = self.catalogue, self.rng.random()
        if kind < 0.4 and self.unused:
            row = len(catalogue)
            return catalogue.add(f"i{row}", self.unused.pop(), f"new {row}", self.some_categories())
        row = int(self.rng.integers(len(catalogue)))
        if kind < 0.6:
            catalogue.describe(row, f"other {row}", self.some_categories())
        else:
            catalogue.listed[row] = not catalogue.listed[row]
        return row


def paths(trie: Trie) -> dict[tuple[int, ...], int]:
    """The items by their tokens, as a search finds them: node by node from the root."""
    log_probs = torch.zeros(1, 1, 30)
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for level in range(trie.levels):
        below: dict[tuple[int, ...], int] = {}
        for path, node in nodes.items():
            scores, child = trie.expand(log_probs, torch.tensor([[node]]), level)
            found = child[0, 0][scores[0, 0] == 0].tolist()
            tokens = trie.token[found].tolist()
            assert tokens == sorted(set(tokens)) and (trie.parent[found] == node).all()
            assert found or node == 0, "a node that leads to no item"
            below |= {(*path, token): each for token, each in zip(tokens, found, strict=True)}
        nodes = below
    assert len(set(nodes.values())) == len(nodes)
    return {path: int(trie.item[node - trie.level_start[trie.levels]]) for path, node in nodes.items()}


def check(index: LiveIndex, rng: np.random.Generator) -> None:
    catalogue, trie = index.catalogue, index.trie
    listed = {tuple(catalogue.tokens[row].tolist()): row for row in np.flatnonzero(catalogue.listed).tolist()}
    assert paths(trie) == listed
    rules = [random_rules(rng, catalogue) for _ in range(3)]
    with index.rules.blocked(rules) as blocked:
        if blocked is None:
            return
        for i, rule in enumerate(rules):
            permitted = catalogue.permitted(rule)
            reached = {0}
            for level in range(trie.levels):
                nodes = torch.tensor(sorted(reached), dtype=torch.int64)
                scores, child = blocked.expand(trie, torch.zeros(3, len(nodes), 30), nodes.expand(3, -1), level)
                reached = set(child[i][scores[i] == 0].tolist())
            rows = {int(trie.item[node - trie.level_start[trie.levels]]) for node in reached}
            assert rows == set(np.flatnonzero(permitted).tolist())
            listed_rows = np.flatnonzero(catalogue.listed)
            assert (~blocked.items(trie)[i].numpy()[listed_rows] == permitted[listed_rows]).all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 60),
    levels=st.integers(1, 3),
    room=st.integers(1, 12),
    entries=st.sampled_from([0, 20, TABLE_ENTRIES]),
    table_bytes=st.sampled_from([0, 0.8, 8]),
    few=st.sampled_from([0, 0.3, 1]),
    least_run=st.sampled_from([0, 2, 256]),
    most_moved=st.sampled_from([0, 0.2, 1]),
)
def test_after_every_change_the_index_is_that_of_the_listed_items(
    seed, items, levels, room, entries, table_bytes, few, least_run, most_moved
):
    """With tables, runs and both; with masks of every kind; with leaves in the order of items, or not any more; and
    with so little room that the index is often full."""
    shop = Shop(min(items, int(np.prod(SIZES[:levels]))), seed, levels)
    shop.catalogue.fields.arrange(build_trie(shop.catalogue.tokens).order)

    def built() -> LiveIndex:
        used = [
            Rules(new_only=True), Rules(categories=("a",)), Rules(catalogue="most"),
            Rules(catalogue="some", categories=("a", "b")),
        ]  # fmt: skip
        known = [rule for rule in used if set(rule.categories) <= shop.catalogue.category_names]
        return LiveIndex(
            shop.catalogue, RANGES[:levels], room=room, prepared=known, set_bytes=4000, table_entries=entries
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.table_masks.TABLE_BYTES", table_bytes)
        patch.setattr("serving.items.prepared_sets.FEW", few)
        patch.setattr("serving.items.ancestry.LEAST_RUN", least_run)
        patch.setattr("serving.items.ancestry.MOST_MOVED", most_moved)
        index = built()
        check(index, shop.rng)
        for _ in range(6):
            rows = [shop.change() for _ in range(int(shop.rng.integers(1, 6)))]
            assert 0 <= index.items.room <= 1
            if index.refresh(rows):
                check_partly(index)
                index = built()
            check(index, shop.rng)


def check_partly(index: LiveIndex) -> None:
    """An index that is full has no part of what it could not take, and whatever it has is listed."""
    listed = set(np.flatnonzero(index.catalogue.listed).tolist())
    assert set(paths(index.trie).values()) <= listed


def test_ids_that_were_given_back_are_used_again() -> None:
    shop = Shop(40, 0, 3)
    index = LiveIndex(shop.catalogue, RANGES, room=8, table_entries=20)
    for row in [int(row) for row in shop.rng.integers(0, 40, 500)]:
        shop.catalogue.listed[row] = not shop.catalogue.listed[row]
        assert index.refresh([row]) == []
    check(index, shop.rng)


def test_a_full_trie_and_a_taken_id_are_errors_that_change_nothing() -> None:
    codes = random_codes(30, SIZES, 1) + FIRST
    trie = LiveTrie(codes[:20], np.arange(20), RANGES, capacity=22, room=2)
    before = paths(trie.trie)
    with pytest.raises(ValueError, match="another item has this"):
        trie.add(20, codes[3].tolist())
    with pytest.raises(TrieFull):
        trie.add(22, codes[21].tolist())
    assert paths(trie.trie) == before
    for row in range(20):
        trie.remove(row)
    assert paths(trie.trie) == {} and 0 not in trie
    trie.add(3, codes[3].tolist())
    assert paths(trie.trie) == {tuple(codes[3].tolist()): 3}
