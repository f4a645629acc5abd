"""Ranking metrics with one relevant item per user, and whether the difference of two of them is more than chance.

The one definition of recall and NDCG, for training and benchmarks. Ranks count from 0. With a single relevant item the
ideal DCG is 1, so DCG is NDCG already.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

CUTOFFS = (5, 10)
RESAMPLES = 2000  # draws of users for an interval


def target_ranks(ranked: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rank of each user's target in the user's list.

    ranked: (U, K) int item rows, best first, -1 where the list has ended; target: (U,) int item rows.
    Returns (U,) int64, 0 for the top of the list, K where the target is not in it.
    """
    if ranked.ndim != 2 or target.shape != ranked.shape[:1]:
        raise ValueError(f"give ranked as (users, k) and target as (users,), not {ranked.shape} and {target.shape}")
    if (target < 0).any():
        raise ValueError("every user needs a target: a row of -1 would match the padding of the list")
    hit = ranked == target[:, None]  # (U, K)
    rank: np.ndarray = np.where(hit.any(axis=1), hit.argmax(axis=1), ranked.shape[1])
    return rank.astype(np.int64)


def ndcg(rank: np.ndarray, cutoff: int = 10) -> np.ndarray:
    """1 / log2(rank + 2), and 0 from the cutoff on. Shape: any -> the same, float64."""
    gain: np.ndarray = np.where(rank < cutoff, 1.0 / np.log2(rank + 2.0), 0.0)
    return gain


def mean_metrics(rank: np.ndarray) -> dict[str, float]:
    """recall@5, recall@10, ndcg@5 and ndcg@10, averaged over all ranks, whatever their shape."""
    if not rank.size:
        raise ValueError("no user to evaluate: check the split, every evaluated user needs a target")
    recall = {f"recall@{k}": float((rank < k).mean()) for k in CUTOFFS}
    return recall | {f"ndcg@{k}": float(ndcg(rank, k).mean()) for k in CUTOFFS}


def recall_ndcg(ranked: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """`mean_metrics` of ranked lists.

    ranked: (U, K >= 10) int item rows, best first, -1 = none; target: (U,) int item rows.
    """
    if ranked.ndim == 2 and ranked.shape[1] < max(CUTOFFS):
        raise ValueError(
            f"a cutoff of {max(CUTOFFS)} needs lists of at least {max(CUTOFFS)} items (pad with -1), "
            f"not {ranked.shape[1]}"
        )
    return mean_metrics(target_ranks(ranked, target))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean of a - b over users, with the ends of its 95% interval when the users are drawn again.

    a, b: (U,) the metric of the same users under two models, in the same order. An interval that holds 0 means that
    this many users cannot tell the two models apart. It does not include the noise of training, which takes more seeds.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"give two arrays over the same two or more users, not {a.shape} and {b.shape}")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    # `batch` limits memory: RESAMPLES x users indices at once would be gigabytes for a large set
    interval = bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, batch=50, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(difference.mean()), float(interval.low), float(interval.high)


def detectable(low: float, high: float) -> float:
    """The smallest true difference that a comparison with this 95% interval would find with 80% power.

    That is 2.8 standard errors, the standard error being the interval's width / 3.92. As the interval, it covers the
    draw of users and not the noise of training.
    """
    return 2.8 * (high - low) / 3.92


def paired_gain(own: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Columns for a table: `gain`, the ends of its interval `gain_low` and `gain_high`, and what was `detectable`.

    own, base: as a and b of `paired_bootstrap`.
    """
    gain, low, high = paired_bootstrap(own, base, seed=0)
    row = {"gain": gain, "gain_low": low, "gain_high": high, "detectable": detectable(low, high)}
    return {name: round(value, 5) for name, value in row.items()}
