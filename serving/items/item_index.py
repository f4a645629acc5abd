"""The items nearest to a query without comparing it with all of them: an inverted-file index by FAISS.

Vectors are put into about 4 sqrt(I) lists by k-means, and a query reads the PROBES lists with the nearest centroids. So
its answer may miss items; `python -m benchmarks.engine.deployed` measures how many. Vectors are kept as float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from serving.errors import BundleError

EXACT_ITEMS = 20_000  # up to here all vectors are compared, which takes a millisecond or two
PROBES = 128
LISTS_PER_ROOT = 4
TRAINED_PER_LIST = 64  # vectors that k-means reads
ROUNDS = 10  # of k-means
CHUNK = 1 << 16  # vectors added at a time


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

    def search(
        self, queries: torch.Tensor, count: int, compared: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The items with the largest inner products, largest first, as far as the lists that are read hold so many.

        compared: read lists with so many items on average, at least one; None: PROBES lists.
        Shape: (Q, D) -> rows (Q, count) int64, -1 where there are fewer, and products (Q, count) float32, -inf there.
        """
        faiss.omp_set_num_threads(torch.get_num_threads())
        parameters: Any = None
        if compared is not None:
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = max(1, round(compared * self._faiss.nlist / self.items))
        product, row = self._faiss.search(queries.contiguous().numpy(), count, params=parameters)
        rows, products = torch.from_numpy(row), torch.from_numpy(product)
        return rows, products.masked_fill(rows < 0, float("-inf"))


def build_index(items: int, vectors_of: Callable[[torch.Tensor], torch.Tensor]) -> ItemIndex:
    """vectors_of: the vectors of rows, which are never needed all at once. Shape: (n,) int64 -> (n, D) float32, finite.

    It reads a sample of TRAINED_PER_LIST vectors a list, and then all in chunks; the index itself takes 2 D + 8 bytes
    an item, and up to twice as much while its lists grow.
    """
    lists = max(1, round(LISTS_PER_ROOT * items**0.5))
    faiss.omp_set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(0)
    sample = rng.choice(items, min(items, lists * TRAINED_PER_LIST), replace=False)
    trained_on = vectors_of(torch.from_numpy(np.sort(sample)))
    index: Any = faiss.index_factory(trained_on.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ROUNDS, TRAINED_PER_LIST, 1
    index.train(trained_on.contiguous().numpy())
    for first in range(0, items, CHUNK):
        rows = torch.arange(first, min(first + CHUNK, items))
        index.add(vectors_of(rows).contiguous().numpy())
    index.nprobe = min(PROBES, lists)
    return ItemIndex(index)


def write_index(path: Path, index: ItemIndex) -> None:
    faiss.write_index(index._faiss, str(path))


def read_index(path: Path, items: int, width: int) -> ItemIndex:
    """Maps what `write_index` wrote; processes share its pages. Raises BundleError if it is not of these vectors."""
    try:
        stored: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        lists: Any = faiss.downcast_InvertedLists(stored.invlists)
        lists.prefetch_nthread = 0  # threads that read ahead cost more than they save
    except (RuntimeError, AttributeError) as error:
        raise BundleError(f"{path.name} is not an index of items; export the bundle again.") from error
    index = ItemIndex(stored)
    if (index.items, index.width) != (items, width):
        raise BundleError(f"{path.name} is not the index of this catalogue; export the bundle again.")
    return index
