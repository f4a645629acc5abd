"""Each item's most similar others, in time that grows hardly faster than the catalogue."""

from __future__ import annotations

import torch
from tqdm import tqdm

from serving.items.item_index import EXACT_ITEMS, make_lists, read_lists
from serving.items.nearest import nearest_items

COMPARED = 5_000  # items that one item is compared with, about, where there is an index: twice as many find hardly more
LISTS_PER_ROOT = 4  # shorter lists than an index that serves: hundreds are wanted of each item, and all have to be near
CHUNK = 1024  # items looked up at a time


def similar_items(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` other items with the largest inner products, largest first, of two items or more.

    Of more than EXACT_ITEMS an index names them, which misses some: the fewer, the better the vectors fall into
    clusters. Shape: (I, D) float32 -> (I, count) int32 rows, -1 where an index has found fewer; narrower where there
    are not as many items.
    """
    items = torch.arange(len(vectors))
    if len(vectors) <= EXACT_ITEMS:
        return nearest_items(vectors, vectors, count, excluded=items).int()
    index = make_lists(len(vectors), vectors.__getitem__, LISTS_PER_ROOT, "SQfp16")
    found = torch.full((len(vectors), count), -1, dtype=torch.int32)
    for first in tqdm(range(0, len(items), CHUNK), desc="similar items", unit="chunk", mininterval=1.0):
        rows = items[first : first + CHUNK]
        named = read_lists(index, vectors[rows], count + 1, COMPARED)
        is_itself = named == rows[:, None]
        is_itself[:, -1] |= ~is_itself.any(1)  # whichever comes last makes room where an item has not found itself
        found[rows] = named[~is_itself].view(len(rows), count).int()
    return found
