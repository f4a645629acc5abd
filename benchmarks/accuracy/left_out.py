"""The counted item memory as training may read it: without the sequence of the user who is being learnt from.

A memory has counted the very transition that a training prefix is to predict, so its share there is far too good. The
counts without a user follow in closed form, and nothing is fitted again:

    w_u(i, j) = (co - co_u)(i, j) / ((n_i - n_ui) ** source * (n_j - n_uj) ** target) + what the texts add
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from training.neighbours import JoinedSetting, Log, forward_pairs


@dataclass(frozen=True, slots=True)
class LeftOut:
    """counts: (I,) training events. pairs: co(i, j). similar: what the texts add. Shapes: (I, I), sparse."""

    setting: JoinedSetting
    max_items: int
    counts: np.ndarray
    pairs: sparse.csr_matrix
    similar: sparse.csr_matrix

    @staticmethod
    def of(log: Log, setting: JoinedSetting, max_items: int) -> LeftOut:
        """log: of all items. max_items: of a history that are looked up."""
        similar = log.weights(replace(setting, window=0))  # no pair is that close
        forward = forward_pairs(log.pairs, len(log.counts), setting.window, setting.distance)
        pairs = (forward + setting.backward * forward.T).tocsr()
        return LeftOut(setting, max_items, log.counts.astype(np.float64), pairs, similar)

    def shares(self, sequence: np.ndarray) -> np.ndarray:
        """n(j | the items before each event but the first), for one training sequence.

        Shape: (T,) item rows -> (T - 1, I) float64, not normalised.
        """
        setting, steps = (
            self.setting,
            np.arange(len(sequence)) - np.arange(len(sequence))[:, None],
        )  # from row to column
        near = np.where((steps > 0) & (steps <= setting.window), np.maximum(steps, 1.0) ** -setting.distance, 0)
        own = (sequence[:, None] == sequence) @ (near + setting.backward * near.T)
        one_hot = np.zeros((len(sequence), len(self.counts)))
        one_hot[np.arange(len(sequence)), sequence] = 1
        pairs = self.pairs[sequence].toarray() - own @ one_hot
        counts = np.maximum(self.counts - np.bincount(sequence, minlength=len(self.counts)), 1)
        weights = pairs / counts[sequence, None] ** setting.source / counts**setting.target
        weights += self.similar[sequence].toarray()
        read = (steps.T >= 0) & (steps.T < self.max_items)  # a prefix ends with its row's event
        bags = np.where(read, (np.maximum(steps.T, 0) + 1.0) ** -setting.recency, 0)
        found: np.ndarray = (bags @ weights)[:-1].clip(min=0)
        return found
