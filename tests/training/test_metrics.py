"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import mean_metrics, ndcg, paired_bootstrap, recall_ndcg, target_ranks

RANKED = np.array(
    [
        [7, 1, 2, 3, 4, 5, 6, 0, 8, 9],  # target 7, rank 0
        [1, 2, 3, 4, 7, 5, 6, 0, 8, 9],  # rank 4, the last place that counts at 5
        [1, 2, 3, 4, 5, 7, 6, 0, 8, 9],  # rank 5, the first that does not
        [1, 2, 3, 4, 5, 6, 0, 8, 9, 7],  # rank 9
        [1, 2, 3, -1, -1, -1, -1, -1, -1, -1],  # not there
    ]
)
TARGET = np.full(5, 7)


def test_by_hand() -> None:
    expected = {
        "recall@5": 2 / 5,
        "recall@10": 4 / 5,
        "ndcg@5": (1 + 1 / math.log2(6)) / 5,
        "ndcg@10": (1 + 1 / math.log2(6) + 1 / math.log2(7) + 1 / math.log2(11)) / 5,
    }
    assert recall_ndcg(RANKED, TARGET) == pytest.approx(expected)
    assert target_ranks(RANKED, TARGET).tolist() == [0, 4, 5, 9, 10]
    assert ndcg(np.array([0, 1, 9, 10])).tolist() == [1, 1 / np.log2(3), 1 / np.log2(11), 0]
    assert mean_metrics(np.array([[0, 4], [5, 9], [10, 10]])) == pytest.approx(
        {name: value * 5 / 6 for name, value in expected.items()}
    )


def test_ranks_beyond_ten_do_not_count() -> None:
    ranked = np.arange(20)[None]
    assert recall_ndcg(ranked, np.array([10]))["recall@10"] == 0
    assert recall_ndcg(ranked, np.array([9]))["recall@10"] == 1


@given(st.permutations(range(12)), st.integers(0, 11))
def test_agrees_with_the_definition(order: list[int], target: int) -> None:
    metrics = recall_ndcg(np.array([order]), np.array([target]))
    for k in (5, 10):
        gains = [float(item == target) for item in order[:k]]
        assert metrics[f"recall@{k}"] == sum(gains)
        assert metrics[f"ndcg@{k}"] == pytest.approx(sum(g / math.log2(n + 2) for n, g in enumerate(gains)))


@pytest.mark.parametrize(
    ("ranked", "target", "reason"),
    [
        (np.zeros((2, 10), int), np.zeros(3, int), "users"),
        (np.zeros((2, 5), int), np.zeros(2, int), "at least 10"),
        (np.zeros((0, 10), int), np.zeros(0, int), "no user"),
        (np.full((1, 10), -1), np.array([-1]), "padding"),
    ],
)
def test_what_cannot_be_measured_is_refused(ranked: np.ndarray, target: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recall_ndcg(ranked, target)


def test_bootstrap_finds_a_real_difference_and_no_other() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    mean, low, high = paired_bootstrap(base + 0.02 + 0.01 * rng.standard_normal(400), base, seed=1)
    assert low < mean < high
    assert mean == pytest.approx(0.02, abs=0.002)
    assert low > 0.015  # pairing takes out the users' own spread (0.29), which would hide a difference of 0.02
    _, low, high = paired_bootstrap(base, base + 0.1 * rng.standard_normal(400), seed=1)
    assert low < 0 < high


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    difference = np.random.default_rng(3).standard_normal(500)
    _, low, high = paired_bootstrap(difference, np.zeros(500), seed=2)
    assert high - low == pytest.approx(2 * 1.96 * difference.std() / math.sqrt(500), rel=0.1)
    assert paired_bootstrap(difference, np.zeros(500), seed=2)[1:] == (low, high)


def test_bootstrap_needs_the_same_users() -> None:
    with pytest.raises(ValueError, match="same"):
        paired_bootstrap(np.zeros(3), np.zeros(4), seed=0)
