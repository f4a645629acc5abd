"""Which of the items found make up a list that people like: maximal marginal relevance, a limit per category, and slots
for new items.

    next = argmax over items i that are left of  (1 - diversity) * relevance(i) - diversity * closest(i)
    closest(i) = max over the chosen j of cos(v_i, v_j)

Carbonell and Goldstein (1998). relevance is the score, scaled to 0..1 over the wide answer [open: scores are
log-probabilities, and cosines of item vectors are at most 1].

The last slots of a list are kept for new items as long as it has fewer of them than it is to explore, so they never
push out what would rank before them, and a list that has enough by itself stays as it is.
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
    explore: int = 0,
) -> list[int]:
    """Indices of up to k items, in the order of the list; fewer where the categories allow no more.

    items: catalogue rows. diversity: 0 orders them by score, at 1 relevance chooses only the first. explore: how many
    new items the list is to have, if so many are there.
    """
    relevance = np.array(scores) - min(scores, default=0.0)
    relevance /= relevance.max(initial=0.0) or 1.0
    vectors = bundle.unit_vectors(items) if diversity else np.zeros((len(items), 1), np.float32)
    closest = np.full(len(items), -1.0)  # cosine to the nearest of the chosen
    is_left = np.ones(len(items), bool)
    is_new = bundle.catalogue.is_new(items)
    taken: Counter[str] = Counter()
    chosen: list[int] = []
    while len(chosen) < k and is_left.any():
        kept = min(explore - int(is_new[chosen].sum()), int((is_left & is_new).sum()))
        is_open = is_left & is_new if kept >= k - len(chosen) else is_left
        value = (1 - diversity) * relevance - diversity * closest
        index = int(np.where(is_open, value, -np.inf).argmax())
        is_left[index] = False
        categories = set(bundle.catalogue.categories[items[index]])
        if max_per_category is None or all(taken[name] < max_per_category for name in categories):
            chosen.append(index)
            taken.update(categories)
            closest = np.maximum(closest, vectors @ vectors[index])
    return chosen
