"""The trie of arrays against a dict of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BundleError
from serving.trie import build_trie
from tests.builders import random_codes


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), items=st.integers(1, 24), levels=st.integers(1, 4))
def test_walks_every_item_and_nothing_else(seed, items, levels):
    sizes = (24, 3, 4, 2)[:levels]
    codes = random_codes(items, sizes, seed) + 7
    trie = build_trie(codes)
    paths = {(): [0]}
    node_of = {(): 0}
    for level in range(levels):
        walked = {}
        for path, (node,) in paths.items():
            ids, exists = trie.children(torch.tensor(node), level)
            for child in ids[exists].tolist():
                walked[(*path, int(trie.token[child]))] = [child]
        assert set(walked) == {tuple(row[: level + 1]) for row in codes.tolist()}
        assert list(walked) == sorted(walked)
        paths = walked
        node_of |= {path: ids[0] for path, ids in walked.items()}
    for row, item in enumerate(codes.tolist()):
        assert int(trie.item[node_of[tuple(item)] - trie.level_start[levels]]) == row

    permitted = torch.from_numpy(np.random.default_rng(seed).random(items) < 0.4)
    blocked = trie.blocked(permitted)
    for path, node in node_of.items():
        below = [row for row, item in enumerate(codes.tolist()) if tuple(item[: len(path)]) == path]
        assert bool(blocked[node]) == (not any(permitted[row] for row in below))


def test_refuses_twins_and_emptiness():
    with pytest.raises(BundleError, match="share one semantic ID"):
        build_trie(np.array([[1, 2], [1, 2]]))
    with pytest.raises(BundleError, match="empty"):
        build_trie(np.zeros((0, 3)))
