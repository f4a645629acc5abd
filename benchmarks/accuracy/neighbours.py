"""Item-to-item neighbours: what followed these items in other people's histories, nearest steps counting most.

    score(j) = sum over the history, t steps back from its newest item, of
               (t + 1) ** -recency * co(i_t, j) / (n_i ** source * n_j ** target)

co and n are those of `training/neighbours.py`. Every exponent is chosen on validation; popularity, made too small to
matter otherwise, orders the items that no neighbour supports.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.memory_scores import coordinate_search, history_weights
from training.neighbours import (
    GRID,
    CountingSettings,
    Pairs,
    event_counts,
    forward_pairs,
    pairs_within,
    scaled_pairs,
)

START = CountingSettings()
BACKFILL = 1e-6  # of the most popular item, far below the score of any neighbour


class Neighbours:
    """Weights between items as one sparse matrix."""

    def __init__(self, pairs: Pairs, counts: np.ndarray, setting: CountingSettings) -> None:
        self.setting = setting
        forward = forward_pairs(pairs, len(counts), setting.window, setting.distance)
        self.weights = scaled_pairs(forward, counts, setting)  # (I, I)
        self.backfill = (BACKFILL * counts / max(counts.max(), 1.0)).astype(np.float32)

    @classmethod
    def fit(cls, sequences: list[np.ndarray], items: int, setting: CountingSettings) -> Neighbours:
        return cls(pairs_within(sequences, setting.window), event_counts(sequences, items), setting)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Shape: (U, I) float32. Histories are item rows, oldest first."""
        history = history_weights(histories, len(self.backfill), self.setting.recency)
        scores: np.ndarray = (history @ self.weights).toarray().astype(np.float32) + self.backfill
        return scores


def tune(
    sequences: list[np.ndarray],
    items: int,
    validation_ndcg: Callable[[Neighbours], float],
    start: CountingSettings = START,
) -> tuple[Neighbours, float]:
    """The setting with the best validation NDCG@10 that a coordinate search finds."""
    pairs, counts = pairs_within(sequences, max(GRID["window"])), event_counts(sequences, items)
    setting, ndcg = coordinate_search(start, GRID, lambda tried: validation_ndcg(Neighbours(pairs, counts, tried)))
    return Neighbours(pairs, counts, setting), ndcg
