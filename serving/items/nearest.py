"""The items nearest to given vectors: one definition for explanations, training and benchmarks."""

from __future__ import annotations

import torch

CHUNK = 1024  # queries compared at once with all items


def nearest_items(
    queries: torch.Tensor, vectors: torch.Tensor, count: int, excluded: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of the `count` items with the largest inner product, largest first: by cosine if all have unit length.

    Shapes: queries (Q, D), vectors (I, D), excluded (Q,) int64, one item per query that is left out, such as the item
    itself -> (Q, count) int64; narrower where there are not as many items.
    """
    count = min(count, len(vectors) - (excluded is not None))
    nearest = torch.empty(len(queries), count, dtype=torch.int64, device=queries.device)
    for begin in range(0, len(queries), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        similarity = queries[chunk] @ vectors.T  # (Q, I)
        if excluded is not None:
            similarity.scatter_(1, excluded[chunk, None], float("-inf"))
        nearest[chunk] = similarity.topk(count).indices
    return nearest
