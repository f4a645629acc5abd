"""Popularity: every user gets the items with the most training events."""

from __future__ import annotations

import numpy as np

from training.neighbours import event_counts


class Popularity:
    """Scores are counts, the same for everybody."""

    def __init__(self, sequences: list[np.ndarray], items: int) -> None:
        self.counts = event_counts(sequences, items)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Shape: (U, I) float32."""
        return np.tile(self.counts, (len(histories), 1))
