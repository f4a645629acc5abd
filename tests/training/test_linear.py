"""The linear model of the next item: against the normal equations in plain loops, cut rows, and huge catalogues."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from training import linear
from training.linear import Moments, largest, linear_weights, predict
from training.memory_scores import history_weights

ITEMS, MAX_ITEMS, RECENCY, RIDGE = 12, 3, 0.7, 2.0


def walks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, ITEMS, rng.integers(1, 9)).astype(np.int32) for _ in range(25)]


def bags_and_next(weights: list[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X and Y, a row per prefix, in plain loops, and what each row counts."""
    bags, following, counted = [], [], []
    for walk, weight in zip(walks(), weights or [np.ones(len(walk)) for walk in walks()], strict=True):
        for end in range(1, len(walk)):
            bag, one_hot = np.zeros(ITEMS), np.zeros(ITEMS)
            for t, (item, own) in enumerate(list(zip(walk, weight, strict=True))[:end][::-1][:MAX_ITEMS]):
                bag[item] += own * (t + 1) ** -RECENCY
            one_hot[walk[end]] = 1
            bags.append(bag)
            following.append(one_hot)
            counted.append(weight[end])
    return np.array(bags), np.array(following), np.array(counted)


def expected_weights() -> np.ndarray:
    x, y, _ = bags_and_next()
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(ITEMS), x.T @ y)


@pytest.fixture
def moments() -> Moments:
    return Moments.of(walks(), ITEMS, MAX_ITEMS, RECENCY)


def test_moments_are_those_of_every_training_prefix(moments: Moments) -> None:
    x, y, _ = bags_and_next()
    np.testing.assert_allclose(moments.gram.toarray(), x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(moments.cross.toarray(), x.T @ y, rtol=1e-5)


def test_an_event_counts_as_much_as_it_weighs_in_a_history_and_as_what_follows() -> None:
    rng = np.random.default_rng(4)
    weights = [rng.uniform(0.2, 3, len(walk)).astype(np.float32) for walk in walks()]
    x, y, counted = bags_and_next(weights)
    found = Moments.of(walks(), ITEMS, MAX_ITEMS, RECENCY, weights)
    np.testing.assert_allclose(found.gram.toarray(), x.T @ (counted[:, None] * x), rtol=1e-4)
    np.testing.assert_allclose(found.cross.toarray(), x.T @ (counted[:, None] * y), rtol=1e-4)


@pytest.mark.parametrize("dense_items", [0, 100])
@pytest.mark.parametrize("block", [5, 100])
def test_weights_solve_the_normal_equations(
    moments: Moments, monkeypatch: pytest.MonkeyPatch, dense_items: int, block: int
) -> None:
    monkeypatch.setattr(linear, "BLOCK", block)
    monkeypatch.setattr(linear, "DENSE_ITEMS", dense_items)
    scale = np.linspace(0.5, 1.5, ITEMS, dtype=np.float32)
    found = linear_weights(moments, RIDGE, scale, keep=ITEMS).toarray()
    assert (found < -0.01).any()  # there is something to lose by dropping signs
    np.testing.assert_allclose(found, expected_weights() * scale, atol=1e-5)


def test_a_prediction_is_the_history_times_the_weights(moments: Moments) -> None:
    history = history_weights([walk[-MAX_ITEMS:] for walk in walks()], ITEMS, RECENCY)
    np.testing.assert_allclose(predict(moments, RIDGE, history), history @ expected_weights(), atol=1e-5)


def test_rows_keep_their_largest_weights_of_either_sign(moments: Moments) -> None:
    found = linear_weights(moments, RIDGE, np.ones(ITEMS, np.float32), keep=4).toarray()
    for row, whole in zip(found, expected_weights(), strict=True):
        kept = np.argsort(-np.abs(whole))[:4]
        np.testing.assert_allclose(row[kept], whole[kept], atol=1e-5)
        assert np.count_nonzero(row) == 4
    np.testing.assert_array_equal(
        found.astype(bool), largest(sparse.csr_matrix(expected_weights()), 4).toarray().astype(bool)
    )


def test_in_a_huge_catalogue_an_item_is_regressed_on_what_most_often_precedes_it(
    moments: Moments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "EXACT_ITEMS", ITEMS - 1)
    monkeypatch.setattr(linear, "PREDECESSORS", 3)
    found = linear_weights(moments, RIDGE, np.ones(ITEMS, np.float32), keep=ITEMS).toarray()
    x, y, _ = bags_and_next()
    for item in range(ITEMS):
        before = np.argsort(-(x.T @ y)[:, item], kind="stable")[:3]
        chosen = np.flatnonzero(found[:, item])
        few = x[:, chosen]
        alone = np.linalg.solve(few.T @ few + RIDGE * np.eye(len(chosen)), few.T @ y[:, item])
        np.testing.assert_allclose((x.T @ y)[chosen, item].sum(), (x.T @ y)[before, item].sum(), rtol=1e-5)
        np.testing.assert_allclose(found[chosen, item], alone, atol=1e-5)


def test_an_item_that_never_occurs_has_no_weights() -> None:
    found = linear_weights(Moments.of(walks(), ITEMS + 1, MAX_ITEMS, 1.0), RIDGE, np.ones(ITEMS + 1, np.float32), 5)
    assert not found[ITEMS].nnz and not found[:, ITEMS].nnz


def test_ties_are_broken_without_regard_to_the_order_of_the_catalogue() -> None:
    kept = {int(largest(sparse.csr_matrix(np.ones((1, items))), 1).indices[0]) for items in range(20, 40)}
    assert len(kept) > 5


def test_of_many_events_a_sample_of_whole_sequences_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [np.array([2 * user, 2 * user + 1], np.int32) for user in range(20)]  # nobody shares an item
    monkeypatch.setattr(linear, "SAMPLED_EVENTS", 15)
    first, second = (Moments.of(sequences, 40, MAX_ITEMS, RECENCY) for _ in range(2))
    before, after = first.cross.nonzero()
    assert len(before) == 7 and (after == before + 1).all() and (before % 2 == 0).all()
    assert 0 < before.max() - before.min() < 40 and (first.cross != second.cross).nnz == 0
    monkeypatch.setattr(linear, "SAMPLED_EVENTS", 40)
    assert Moments.of(sequences, 40, MAX_ITEMS, RECENCY).cross.nnz == 20
