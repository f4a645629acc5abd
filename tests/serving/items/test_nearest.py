"""Nearest items against a full sort, over more queries than are compared at once."""

from __future__ import annotations

import pytest
import torch

from serving.items import nearest
from serving.items.nearest import nearest_items


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CHUNK", 4)


def test_nearest_items_are_those_of_a_full_sort() -> None:
    queries, vectors = torch.randn(10, 5), torch.randn(30, 5)
    expected = (queries @ vectors.T).argsort(1, descending=True)[:, :7]
    assert nearest_items(queries, vectors, 7).equal(expected)


def test_an_excluded_item_is_never_its_own_neighbour() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(9, 3), dim=1)
    itself = torch.arange(9)
    found = nearest_items(vectors, vectors, 3, excluded=itself)
    assert not (found == itself[:, None]).any()
    assert found.equal(nearest_items(vectors, vectors, 4)[:, 1:])


@pytest.mark.parametrize(("items", "excluded", "expected"), [(2, None, 2), (2, 1, 1), (1, 1, 0)])
def test_a_small_catalogue_has_fewer(items: int, excluded: int | None, expected: int) -> None:
    vectors = torch.randn(items, 3)
    leave_out = None if excluded is None else torch.arange(items)
    assert nearest_items(vectors, vectors, 5, leave_out).shape == (items, expected)
