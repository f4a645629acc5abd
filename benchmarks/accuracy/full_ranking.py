"""Full ranking by models that score every item at once, as the baselines do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

HISTORY_ITEMS = 20
TOP = 10

Score = Callable[[list[np.ndarray]], np.ndarray]  # histories of U users -> (U, I) float scores


def top_items(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """The ten best items per user. scores: (U, I) float, -inf for excluded items. Returns (U, 10) int64, -1 = none.

    Ties are broken in an order drawn from the seed: rows may follow item ids, which may reveal the target.
    """
    shuffled = np.random.default_rng(seed).permutation(scores.shape[1])
    tried = torch.from_numpy(np.ascontiguousarray(scores[:, shuffled]))
    values, index = tried.topk(min(TOP, scores.shape[1]), dim=1)
    ranked = np.full((len(scores), TOP), -1, np.int64)
    ranked[:, : index.shape[1]] = np.where(values.numpy() > -np.inf, shuffled[index.numpy()], -1)
    return ranked


def rank(score: Score, histories: list[np.ndarray], exclude_seen: bool, batch: int = 512, seed: int = 0) -> np.ndarray:
    """Full ranking of all items. The model sees the last 20 items; excluded are all items of the history.

    histories: U arrays of item rows, oldest first. Returns (U, 10) int64, best first, -1 = none.
    """
    ranked = []
    for first in range(0, len(histories), batch):
        whole = histories[first : first + batch]
        scores = score([h[-HISTORY_ITEMS:] for h in whole])
        if exclude_seen:
            scores[np.repeat(np.arange(len(whole)), [len(h) for h in whole]), np.concatenate(whole)] = -np.inf
        ranked.append(top_items(scores, seed))
    return np.concatenate(ranked)
