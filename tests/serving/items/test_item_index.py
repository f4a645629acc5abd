"""The approximate index: it finds nearly all of the nearest, and all of them if it reads every list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.errors import BundleError
from serving.items.item_index import ItemIndex, build_index, read_index, write_index
from serving.items.nearest import nearest_items


def clustered(items: int, width: int = 16) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(items // 20, width, generator=rng)
    return centres[torch.arange(items) % len(centres)] + 0.3 * torch.randn(items, width, generator=rng)


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    return clustered(5000)


@pytest.fixture(scope="module")
def index(vectors: torch.Tensor) -> ItemIndex:
    return build_index(len(vectors), vectors.__getitem__)


def test_most_of_the_nearest_items_are_found(vectors: torch.Tensor, index: ItemIndex) -> None:
    queries = vectors[::100]
    rows, products = index.search(queries, 10, vectors.__getitem__)
    exact = nearest_items(queries, vectors, 10)
    recall = torch.tensor([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
    assert recall.mean() > 0.95
    torch.testing.assert_close(products, (queries @ vectors.T).gather(1, rows))
    assert (products.diff(dim=1) <= 0).all()


def test_what_is_not_there_has_no_row() -> None:
    vectors = clustered(40)
    rows, products = build_index(len(vectors), vectors.__getitem__).search(vectors[:2], 50, vectors.__getitem__)
    for row, product in zip(rows, products, strict=True):
        assert sorted(row[:40].tolist()) == list(range(40)) and row[40:].tolist() == [-1] * 10
        assert (product[40:] == -torch.inf).all()


def test_the_same_vectors_make_the_same_file_and_it_answers_as_before(
    vectors: torch.Tensor, index: ItemIndex, tmp_path: Path
) -> None:
    for name, made in (("one", index), ("two", build_index(len(vectors), vectors.__getitem__))):
        write_index(tmp_path / name, made)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_index(tmp_path / "one", *vectors.shape)
    for ours, theirs in zip(
        *(made.search(vectors[:9], 7, vectors.__getitem__) for made in (found, index)), strict=True
    ):
        assert ours.equal(theirs)


def test_a_file_that_does_not_fit_is_refused(vectors: torch.Tensor, index: ItemIndex, tmp_path: Path) -> None:
    write_index(tmp_path / "whole", index)
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "other").write_bytes(b"something else")
    for name in ("cut", "other"):
        with pytest.raises(BundleError, match=f"{name} is not an index of items; export"):
            read_index(tmp_path / name, *vectors.shape)
    for items, width in ((4999, 16), (5000, 17)):
        with pytest.raises(BundleError, match="whole is not the index of this catalogue; export"):
            read_index(tmp_path / "whole", items, width)
