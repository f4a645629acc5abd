"""How a memory's settings are judged: what a weighted history predicts, and where the target of each user ranks.

[open: none of this is in the paper.]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from scipy import sparse
from tqdm import tqdm

from training.metrics import ndcg

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

CHUNK = 1024  # users at once
PASSES = 2  # over all values of all settings


def history_weights(
    histories: Sequence[np.ndarray], items: int, recency: float, weights: Sequence[np.ndarray] | None = None
) -> sparse.csr_matrix:
    """(t + 1) ** -recency of every item of a history, oldest first, times the weight of its event.

    Shape: (U, I); times w it is n(j | history).
    """
    lengths = np.array([len(history) for history in histories])
    steps_back = np.concatenate([np.arange(n, 0, -1) for n in lengths])  # 1 for the newest
    owner = np.repeat(np.arange(len(lengths)), lengths)
    factor = steps_back**-recency if weights is None else steps_back**-recency * np.concatenate(list(weights))
    return sparse.csr_matrix((factor, (owner, np.concatenate(list(histories)))), shape=(len(lengths), items))


def ndcg_of(
    history: sparse.csr_matrix,
    weights: sparse.csr_matrix,
    target: np.ndarray,
    excluded: sparse.csr_matrix | None = None,
) -> np.ndarray:
    """NDCG@10 of n(j | history) per user. Shapes: (U, I), (I, I), (U,) -> (U,) float64.

    Equal scores rank ahead of the target; a target whose score is not positive is missed. excluded: (U, I), 1 for the
    items that a user's ranking leaves out.
    """
    found = []
    for first in range(0, len(target), CHUNK):
        scores = (history[first : first + CHUNK] @ weights).tocsr()
        if excluded is not None:
            scores = (scores - scores.multiply(excluded[first : first + CHUNK])).tocsr()
        wanted = target[first : first + CHUNK]
        row = np.repeat(np.arange(len(wanted)), np.diff(scores.indptr))
        own = np.bincount(row, scores.data * (scores.indices == wanted[row]), minlength=len(wanted))
        rank = np.bincount(row, scores.data >= own[row], minlength=len(wanted)) - 1  # the target itself does not count
        found.append(ndcg(np.where(own > 0, rank, np.inf)))
    return np.concatenate(found)


def seen_items(histories: Sequence[np.ndarray], items: int) -> sparse.csr_matrix:
    """1 for the items of a history. Shape: (U, I)."""
    owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    seen = np.concatenate(list(histories))
    matrix = sparse.csr_matrix((np.ones(len(seen)), (owner, seen)), shape=(len(histories), items))
    matrix.data[:] = 1  # an item may come more than once
    return matrix


def target_ndcg(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same of scores for every item. Shapes: (U, I), (U,) -> (U,) float64."""
    own = scores[np.arange(len(target)), target]
    rank = (scores >= own[:, None]).sum(1) - 1
    return ndcg(np.where(own > 0, rank, np.inf))


def coordinate_search(
    start: S, grid: dict[str, tuple[Any, ...]], score: Callable[[S], float], desc: str | None = None
) -> tuple[S, float]:
    """Tries the values of one field after the other, in two passes at most, and keeps what raises the score.

    desc: names the search in a progress bar; None: there is none. The second pass may not be needed.
    """
    best, best_score = start, score(start)
    steps = PASSES * sum(map(len, grid.values()))
    with tqdm(total=steps, desc=desc, unit="setting", mininterval=1.0, disable=desc is None) as bar:
        for _ in range(PASSES):
            before = best_score
            for name, values in grid.items():
                for value in values:
                    setting = replace(best, **{name: value})
                    if setting != best and (found := score(setting)) > best_score:
                        best, best_score = setting, found
                    bar.update()
            if best_score == before:
                break
    return best, best_score
