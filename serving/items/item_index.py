"""The items nearest to a query without comparing it with all of them: an inverted-file index by FAISS.

Vectors are put into about sqrt(I) lists by k-means, each as 4 bits for every two of its numbers, which a processor
compares 32 vectors at a time. A query reads the lists with the nearest centroids until COMPARED items are compared, and
those that seem nearest, NAMED or twice as many as are wanted, are then compared exactly, with vectors that the caller
makes: an index has none. Its answer may miss items; `python -m benchmarks.engine.deployed` measures how many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from serving.errors import BundleError

EXACT_ITEMS = 20_000  # up to here all vectors are compared, which takes a millisecond or two
COMPARED = 1 << 16
NAMED = 128
TRAINED_PER_LIST = 64  # vectors that k-means reads
ROUNDS = 10  # of k-means
CHUNK = 1 << 16  # vectors added at a time

VectorsOf = Callable[[torch.Tensor], torch.Tensor]  # of rows, (...) int64 -> (..., D) float32


@dataclass(frozen=True, slots=True)
class ItemIndex:
    """items: I, the number of vectors. width: D, their length."""

    _faiss: Any

    @property
    def items(self) -> int:
        return int(self._faiss.ntotal)

    @property
    def width(self) -> int:
        return int(self._faiss.d)

    def search(self, queries: torch.Tensor, count: int, vectors_of: VectorsOf) -> tuple[torch.Tensor, torch.Tensor]:
        """The items with the largest inner products, largest first, as far as the lists that are read hold so many.

        Shape: (Q, D) -> rows (Q, count) int64, -1 where there are fewer, and products (Q, count) float32, -inf there.
        """
        rows = read_lists(self._faiss, queries, max(2 * count, NAMED), COMPARED)
        products = (vectors_of(rows.clamp(min=0)) @ queries.unsqueeze(2)).squeeze(2).masked_fill(rows < 0, -torch.inf)
        best = products.topk(count)
        return rows.gather(1, best.indices), best.values


def build_index(items: int, vectors_of: VectorsOf) -> ItemIndex:
    """vectors_of: the vectors of rows, finite and never needed all at once. The index takes D / 4 + 8 bytes an item."""
    width = vectors_of(torch.zeros(1, dtype=torch.int64)).shape[1]
    parts = width // 2 if width % 2 == 0 else width
    return ItemIndex(make_lists(items, vectors_of, 1, f"PQ{parts}x4fs"))


def make_lists(items: int, vectors_of: VectorsOf, lists_per_root: int, codes: str) -> Any:
    """FAISS's inverted lists of all vectors, in about `lists_per_root` * sqrt(I) lists, for inner products.

    codes: how a vector is stored, in the words of FAISS's `index_factory`. Reads a sample of TRAINED_PER_LIST vectors a
    list, and then all in chunks; the lists take up to twice their size while they grow.
    """
    lists = max(1, round(lists_per_root * items**0.5))
    faiss.omp_set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(0)
    sample = rng.choice(items, min(items, lists * TRAINED_PER_LIST), replace=False)
    trained_on = vectors_of(torch.from_numpy(np.sort(sample)))
    index: Any = faiss.index_factory(trained_on.shape[1], f"IVF{lists},{codes}", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ROUNDS, TRAINED_PER_LIST, 1
    index.train(trained_on.contiguous().numpy())
    for first in range(0, items, CHUNK):
        rows = torch.arange(first, min(first + CHUNK, items))
        index.add(vectors_of(rows).contiguous().numpy())
    return index


def read_lists(index: Any, queries: torch.Tensor, count: int, compared: int) -> torch.Tensor:
    """The rows with the largest inner products by the lists' codes, largest first, -1 where there are fewer.

    compared: the items that the lists hold which are read, on average; one list at least is.
    Shape: (Q, D) -> (Q, count) int64.
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    parameters = _parameters(min(max(1, round(compared * index.nlist / index.ntotal)), index.nlist))
    return torch.from_numpy(index.search(queries.contiguous().numpy(), count, params=parameters)[1])


@cache
def _parameters(lists: int) -> Any:
    """Kept, for making them takes as long as reading a tenth of the lists."""
    parameters: Any = faiss.SearchParametersIVF()
    parameters.nprobe = lists
    return parameters


def write_index(path: Path, index: ItemIndex) -> None:
    faiss.write_index(index._faiss, str(path))


def read_index(path: Path, items: int, width: int) -> ItemIndex:
    """Reads what `write_index` wrote. Raises BundleError if it is not of these vectors."""
    try:
        index = ItemIndex(faiss.read_index(str(path)))
    except RuntimeError as error:
        raise BundleError(f"{path.name} is not an index of items; export the bundle again.") from error
    if (index.items, index.width) != (items, width):
        raise BundleError(f"{path.name} is not the index of this catalogue; export the bundle again.")
    return index
