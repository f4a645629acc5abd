"""Ranking metrics with one relevant item per user, and whether a difference of two of them is more than chance."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

CUTOFFS = (5, 10)


def target_ranks(ranked: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where each user's target stands in the user's list.

    ranked: (U, K) int item rows, best first, -1 where the list has ended; target: (U,) int item rows.
    Returns (U,) int64, 0 for the first place, K where the target is not in the list.
    """
    if ranked.ndim != 2 or target.shape != ranked.shape[:1]:
        raise ValueError(f"give ranked as (users, k) and target as (users,), not {ranked.shape} and {target.shape}")
    if (target < 0).any():
        raise ValueError("every user needs a target: a row of -1 would match the padding of the list")
    hit = ranked == target[:, None]  # (U, K)
    return np.where(hit.any(axis=1), hit.argmax(axis=1), ranked.shape[1]).astype(np.int64)


def ndcg_per_user(ranked: np.ndarray, target: np.ndarray, cutoff: int = 10) -> np.ndarray:
    """1 / log2(rank + 2) with the rank counted from 0, and 0 beyond the cutoff. Shape: (U,) float64.

    With one relevant item the ideal DCG is 1, so DCG is NDCG already.
    """
    _require_places(ranked, cutoff)
    rank = target_ranks(ranked, target)
    return np.where(rank < cutoff, 1.0 / np.log2(rank + 2.0), 0.0)


def recall_ndcg(ranked: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Means over users: recall@5, recall@10, ndcg@5, ndcg@10.

    ranked: (U, K >= 10) int item rows, best first, -1 = none; target: (U,) int item rows.
    """
    if len(target) == 0:
        raise ValueError("no user to evaluate: check the split, every evaluated user needs a target")
    _require_places(ranked, max(CUTOFFS))
    rank = target_ranks(ranked, target)
    recall = {f"recall@{k}": float((rank < k).mean()) for k in CUTOFFS}
    return recall | {f"ndcg@{k}": float(ndcg_per_user(ranked, target, k).mean()) for k in CUTOFFS}


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of a - b over users, with the ends of its 95% interval when the users are drawn again.

    a, b: (U,) the metric of the same users under two models, in the same order. An interval that holds 0 means that
    this many users cannot tell the two models apart. The noise of training is not in it: that takes more seeds.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"give two arrays over the same two or more users, not {a.shape} and {b.shape}")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    # batch bounds the memory: resamples x users indices at once would be gigabytes for a large set
    interval = bootstrap(
        (difference,), np.mean, n_resamples=resamples, batch=50, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(difference.mean()), float(interval.low), float(interval.high)


def _require_places(ranked: np.ndarray, cutoff: int) -> None:
    if ranked.shape[1] < cutoff:
        raise ValueError(
            f"a cutoff of {cutoff} needs lists of at least {cutoff} places (pad with -1), not {ranked.shape[1]}"
        )
