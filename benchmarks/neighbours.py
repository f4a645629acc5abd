"""Item-to-item neighbours: what followed these items in other people's histories, nearest steps counting most.

    w(i, j)  = sum over pairs of one sequence, i then j, d <= window steps apart, of d ** -distance,
               plus backward * the same for j then i
    score(j) = sum over the history, t steps back from its newest item, of
               (t + 1) ** -recency * w(i_t, j) / (n_i ** source * n_j ** target)

n counts training events. Every exponent is chosen on validation; popularity, made too small to matter otherwise,
orders the items that no neighbour supports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.popularity import item_counts

BACKFILL = 1e-6  # of the most popular item, far below the score of any neighbour


@dataclass(frozen=True, slots=True)
class Setting:
    """The choices that validation makes (formula at the head of this file)."""

    window: int = 20
    distance: float = 0.5
    backward: float = 0.5
    recency: float = 1.0
    source: float = 0.5
    target: float = 0.25


GRID: dict[str, tuple[Any, ...]] = {
    "recency": (0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
    "distance": (0.0, 0.25, 0.5, 1.0, 1.5),
    "backward": (0.0, 0.25, 0.5, 0.75, 1.0),
    "target": (0.0, 0.15, 0.3, 0.5),
    "source": (0.0, 0.25, 0.5, 0.75, 1.0),
    "window": (1, 3, 5, 10, 20),
}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Ordered pairs of one sequence: (P,) item rows, the earlier and the later, and how many steps lie between."""

    earlier: np.ndarray
    later: np.ndarray
    steps: np.ndarray


def pairs_within(sequences: list[np.ndarray], window: int) -> Pairs:
    """All pairs at most `window` steps apart."""
    flat = np.concatenate(sequences)
    owner = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    earlier, later, steps = [], [], []
    for d in range(1, window + 1):
        same = owner[:-d] == owner[d:]
        earlier.append(flat[:-d][same])
        later.append(flat[d:][same])
        steps.append(np.full(int(same.sum()), d))
    return Pairs(np.concatenate(earlier), np.concatenate(later), np.concatenate(steps))


class Neighbours:
    """Weights between items as one sparse matrix."""

    def __init__(self, pairs: Pairs, counts: np.ndarray, setting: Setting) -> None:
        near = pairs.steps <= setting.window
        earlier, later = pairs.earlier[near], pairs.later[near]
        weight = pairs.steps[near].astype(np.float64) ** -setting.distance
        items = len(counts)
        forward = sparse.coo_matrix((weight, (earlier, later)), shape=(items, items)).tocsr()
        events = np.maximum(counts, 1.0)
        self.setting = setting
        self.weights: sparse.csr_matrix = (  # (I, I)
            sparse.diags(events**-setting.source)
            @ (forward + setting.backward * forward.T)
            @ sparse.diags(events**-setting.target)
        ).tocsr()
        self.backfill = (BACKFILL * counts / events.max()).astype(np.float32)

    @classmethod
    def fit(cls, sequences: list[np.ndarray], items: int, setting: Setting) -> Neighbours:
        return cls(pairs_within(sequences, setting.window), item_counts(sequences, items), setting)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Shape: (U, I) float32. Histories are item rows, oldest first."""
        lengths = np.array([len(h) for h in histories])
        steps_back = np.concatenate([np.arange(n, 0, -1) for n in lengths])  # 1 for the newest
        owner = np.repeat(np.arange(len(lengths)), lengths)
        history = sparse.csr_matrix(
            (steps_back**-self.setting.recency, (owner, np.concatenate(histories))),
            shape=(len(lengths), len(self.backfill)),
        )
        return (history @ self.weights).toarray().astype(np.float32) + self.backfill


def tune(
    sequences: list[np.ndarray],
    items: int,
    validation_ndcg: Callable[[Neighbours], float],
    start: Setting = Setting(),
    passes: int = 2,
) -> tuple[Neighbours, float]:
    """One choice after the other through GRID, twice over, keeping what raises the validation NDCG@10."""
    pairs, counts = pairs_within(sequences, max(GRID["window"])), item_counts(sequences, items)
    best = Neighbours(pairs, counts, start)
    best_ndcg = validation_ndcg(best)
    for _ in range(passes):
        before = best_ndcg
        for name, values in GRID.items():
            for value in values:
                setting = dataclasses.replace(best.setting, **{name: value})
                if setting == best.setting:
                    continue
                candidate = Neighbours(pairs, counts, setting)
                ndcg = validation_ndcg(candidate)
                if ndcg > best_ndcg:
                    best, best_ndcg = candidate, ndcg
        if best_ndcg == before:
            break
    return best, best_ndcg
