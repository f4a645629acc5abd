"""The most similar items: in a small catalogue exactly those of all comparisons, nearly all of them by an index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serving.items.nearest import nearest_items
from training import similar
from training.neighbours import nearest
from training.similar import similar_items

ITEMS = 3000


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    """In clusters of about 20, which lie in a space of few dimensions, as items that resemble each other do."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(ITEMS // 20, 6, generator=rng) @ torch.randn(6, 32, generator=rng)
    spread = torch.randn(ITEMS, 32, generator=rng)
    return F.normalize(centres[torch.arange(ITEMS) % len(centres)] + 0.5 * spread, dim=1)


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "EXACT_ITEMS", ITEMS // 4)
    monkeypatch.setattr(similar, "CHUNK", 512)


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def test_a_small_catalogue_is_compared_whole(vectors: torch.Tensor) -> None:
    few = vectors[:50]
    order = (few @ few.T).fill_diagonal_(-2).argsort(1, descending=True)
    assert similar_items(few, 7).equal(order[:, :7].int())
    assert similar_items(few[:4], 7).shape == (4, 3)


def test_an_index_compares_a_share_and_misses_few(
    vectors: torch.Tensor, indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = nearest_items(vectors, vectors, 10, excluded=torch.arange(ITEMS))
    found = {}
    for compared in (ITEMS // 50, ITEMS // 10, ITEMS):
        monkeypatch.setattr(similar, "COMPARED", compared)
        rows = similar_items(vectors, 10)
        assert rows.shape == (ITEMS, 10) and not (rows == torch.arange(ITEMS)[:, None]).any()
        found[compared] = recall(rows, exact)
    assert found[ITEMS // 50] < found[ITEMS // 10] <= found[ITEMS]
    assert found[ITEMS // 10] > 0.99 and found[ITEMS] > 0.998  # float16 swaps a few that are nearly as near


def test_what_an_index_does_not_find_has_no_row(
    vectors: torch.Tensor, indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar, "COMPARED", 1)  # a single list
    found = similar_items(vectors, 100)
    named = [row[row >= 0].tolist() for row in found]
    assert (found[:, -1] == -1).all()
    assert all(len({*row}) == len(row) and item not in row for item, row in enumerate(named))
    rows, columns = nearest(vectors.numpy(), 100)
    assert list(zip(rows, columns, strict=True)) == [(item, other) for item, row in enumerate(named) for other in row]
