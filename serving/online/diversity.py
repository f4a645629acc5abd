"""Which items of a wide answer make up a list that people like: maximal marginal relevance, and a limit per category.

    next = argmax over items i that are left of  (1 - diversity) * relevance(i) - diversity * closest(i)
    closest(i) = max over the chosen j of cos(v_i, v_j)

Carbonell and Goldstein (1998). relevance is the score, scaled to 0..1 over the wide answer [open: scores are
log-probabilities, and cosines of item vectors are at most 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from serving.bundle import Bundle


def choose(
    bundle: Bundle,
    items: Sequence[int],
    scores: Sequence[float],
    k: int,
    diversity: float,
    max_per_category: int | None,
) -> list[int]:
    """Indices of up to k items, in the order of the list; fewer where the categories allow no more.

    items: catalogue rows, best first. diversity: 0 keeps their order, at 1 relevance chooses only the first.
    """
    relevance = np.array(scores) - min(scores, default=0.0)
    relevance /= relevance.max(initial=0.0) or 1.0
    vectors = bundle.unit_vectors(items) if diversity else np.zeros((len(items), 1), np.float32)
    closest = np.full(len(items), -1.0)  # cosine to the nearest of the chosen
    is_left = np.ones(len(items), bool)
    taken: Counter[str] = Counter()
    chosen: list[int] = []
    while len(chosen) < k and is_left.any():
        value = (1 - diversity) * relevance - diversity * closest
        index = int(np.where(is_left, value, -np.inf).argmax())
        is_left[index] = False
        categories = set(bundle.catalogue.categories[items[index]])
        if max_per_category is None or all(taken[name] < max_per_category for name in categories):
            chosen.append(index)
            taken.update(categories)
            closest = np.maximum(closest, vectors @ vectors[index])
    return chosen
