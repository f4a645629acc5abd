"""The trie of arrays against a dict of prefixes, and its two representations of children against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BundleError
from serving.items.trie import TABLE_ENTRIES, build_trie
from tests.builders import random_codes

SIZES = (24, 3, 4, 2)
VOCABULARY = 60


def catalogue(items: int, levels: int, seed: int) -> np.ndarray:
    """Random semantic IDs whose levels have blocks of their own, as a vocabulary lays them out."""
    sizes = SIZES[:levels]
    return random_codes(items, sizes, seed) + 7 + np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    items=st.integers(1, 24),
    levels=st.integers(1, 4),
    entries=st.sampled_from([0, 30, TABLE_ENTRIES]),
)
def test_every_item_and_nothing_else_can_be_reached(seed, items, levels, entries):
    codes = catalogue(items, levels, seed)
    trie = build_trie(codes, table_entries=entries)
    prefixes = {tuple(row[:length]) for row in codes.tolist() for length in range(levels + 1)}
    assert (trie.nodes, trie.levels) == (len(prefixes), levels)
    log_probs = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 1, VOCABULARY)))
    node_of = {(): 0}
    for level in range(levels):
        walked = {}
        for path in [path for path in node_of if len(path) == level]:
            scores, child = trie.expand(log_probs, torch.tensor([[node_of[path]]]), level)
            assert (child >= trie.level_start[level + 1]).all() and (child < trie.level_start[level + 2]).all()
            real = scores[0, 0] > -torch.inf
            for node, score in zip(child[0, 0][real].tolist(), scores[0, 0][real].tolist(), strict=True):
                token = int(trie.token[node])
                assert score == log_probs[0, 0, token]
                assert int(trie.parent[node]) == node_of[path]
                walked[(*path, token)] = node
        assert set(walked) == {tuple(row[: level + 1]) for row in codes.tolist()}
        assert list(walked) == sorted(walked)
        assert list(walked.values()) == list(range(trie.level_start[level + 1], trie.level_start[level + 2]))
        node_of |= walked
    for row, item in enumerate(codes.tolist()):
        leaf = node_of[tuple(item)] - trie.level_start[levels]
        assert int(trie.item[leaf]) == row and int(trie.leaf[row]) == leaf


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    items=st.integers(1, 400),
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    levels=st.integers(1, 4),
)
def test_tables_and_runs_give_the_same_children(seed, items, batch, rows, levels):
    codes = catalogue(min(items, int(np.prod(SIZES[:levels]))), levels, seed)
    tables, runs = build_trie(codes), build_trie(codes, table_entries=0)
    rng = np.random.default_rng(seed)
    assert all(table.numel() for table in tables.tables) and not any(table.numel() for table in runs.tables)
    for level in range(levels):
        node = torch.from_numpy(rng.integers(*tables.level_start[level : level + 2], (batch, rows)))
        log_probs = torch.from_numpy(rng.standard_normal((batch, rows, VOCABULARY)).astype(np.float32))
        found = []
        for trie in (tables, runs):
            scores, child = trie.expand(log_probs, node, level)
            assert child.dtype == torch.int32 and scores.dtype == torch.float32
            width = scores.shape[-1]
            real = scores > -torch.inf
            found.append([
                list(zip(child[b, q][real[b, q]].tolist(), scores[b, q][real[b, q]].tolist(), strict=True))
                for b in range(batch) for q in range(rows)
            ])  # fmt: skip
            assert width == (trie.tokens[level] if trie.tables[level].numel() else trie.max_children[level])
        assert found[0] == found[1] and all(found[0])


def test_duplicate_ids_and_empty_catalogues_are_refused():
    with pytest.raises(BundleError, match="share one semantic ID"):
        build_trie(np.array([[1, 2], [1, 2]]))
    with pytest.raises(BundleError, match="empty"):
        build_trie(np.zeros((0, 3)))
    with pytest.raises(BundleError, match="empty"):
        build_trie(np.zeros((3, 0)))


def test_ids_of_more_than_63_bits_are_in_token_order():
    """Eight levels whose ranges multiply to more than 63 bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, (200, 8)) * 40_000 + rng.integers(0, 3, (200, 8))
    codes = np.unique(codes, axis=0)  # in token order
    shuffled = rng.permutation(len(codes))
    trie = build_trie(codes[shuffled])
    assert shuffled[trie.item.numpy()].tolist() == list(range(len(codes)))
