"""Fitting the item graph: weights by hand, truncated rows, nothing learnt from held-out events."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from serving.bundle import Bundle
from tests.training.shops import command, write_shop
from tests.training.small import small_config
from training.__main__ import main
from training.config_file import ConfigError
from training.data.read import Items
from training.linear import largest
from training.memory_scores import coordinate_search, history_weights, ndcg_of, seen_items, target_ndcg
from training.neighbours import (
    CountedLog,
    JoinedSetting,
    nearest,
    similarity_embedding,
)

BY_HAND = JoinedSetting(
    window=2, distance=1.0, backward=0.25, source=0.5, target=1.0, similar_weight=2.0, similar_temperature=0.5
)


def seq(*items: int) -> np.ndarray:
    return np.array(items, np.int32)


def items_without_text(count: int) -> Items:
    nothing = [None] * count
    return Items([f"i{row}" for row in range(count)], nothing, nothing, [[] for _ in range(count)], nothing)


def test_weights_by_hand():
    """0 and 1 point the same way, 2 at right angles to them; nothing is known of 3."""
    embedding = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], np.float32)
    log = CountedLog.of([seq(0, 1, 2, 3), seq(1, 2)], embedding, nearest(embedding, 4))  # n = 1, 2, 2, 1
    weights = log.weights(BY_HAND).toarray()
    same, apart = 2.0, 2.0 * np.exp(-2.0)
    expected = [
        [0, 1 / 2 + same, 0.5 / 2 + apart, 0],
        [0.25 / 2**0.5 + same, 0, 2 / (2**0.5 * 2) + apart, 0.5 / 2**0.5],
        [0.25 * 0.5 / 2**0.5 + apart, 0.25 * 2 / (2**0.5 * 2) + apart, 0, 1 / 2**0.5],
        [0, 0.25 * 0.5 / 2, 0.25 / 2, 0],
    ]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_weighted_events_by_hand():
    """A pair counts the product of its events' weights, an item the sum of its own."""
    setting = replace(BY_HAND, similar_weight=0.0)
    weights = [np.array([2, 1, 3], np.float32), np.array([0.5, 1], np.float32)]
    embedding = np.zeros((3, 2), np.float32)
    log = CountedLog.of([seq(0, 1, 2), seq(1, 2)], embedding, nearest(embedding, 4), weights=weights)  # n = 2, 1.5, 4
    n0, n1, n2 = 2.0, 1.5, 4.0
    expected = [
        [0, 2 / (n0**0.5 * n1), 6 / 2 / (n0**0.5 * n2)],
        [0.25 * 2 / (n1**0.5 * n0), 0, (3 + 0.5) / (n1**0.5 * n2)],
        [0.25 * 6 / 2 / (n2**0.5 * n0), 0.25 * (3 + 0.5) / (n2**0.5 * n1), 0],
    ]
    np.testing.assert_allclose(log.weights(setting).toarray(), expected, rtol=1e-6)


def test_some_rows_are_those_of_the_whole():
    rng = np.random.default_rng(4)
    embedding = rng.standard_normal((40, 6)).astype(np.float32)
    sequences = [rng.integers(0, 40, 6).astype(np.int32) for _ in range(15)]
    similar, rows = nearest(embedding, 7), np.array([2, 3, 5, 38])
    whole, some = (CountedLog.of(sequences, embedding, similar, part).weights(JoinedSetting()) for part in (None, rows))
    assert some.nnz < whole.nnz
    np.testing.assert_array_equal(some[rows].toarray(), whole[rows].toarray())


def test_an_item_is_not_similar_to_itself():
    embedding = np.eye(2, dtype=np.float32)
    weights = CountedLog.of([seq(0, 0), seq(1)], embedding, nearest(embedding, 1)).weights(BY_HAND).toarray()
    assert weights[0, 0] == pytest.approx(1.25 / (2**0.5 * 2))


def test_the_candidates_include_everything_that_a_row_keeps():
    """Against all pairs of items, brute force: the rows that remain after the cut are the same."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((40, 6)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    sequences = [rng.integers(0, 40, 6).astype(np.int32) for _ in range(15)]
    setting = JoinedSetting(similar_weight=0.7)
    whole, few = (CountedLog.of(sequences, embedding, nearest(embedding, keep)).weights(setting) for keep in (40, 7))
    assert few.nnz < whole.nnz
    np.testing.assert_allclose(largest(few, 7).toarray(), largest(whole, 7).toarray(), rtol=1e-6)


def test_a_row_keeps_its_largest_weights():
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((30, 5)).astype(np.float32)
    weights = CountedLog.of([seq(*range(30))], embedding, nearest(embedding, 29)).weights(JoinedSetting())
    kept = largest(weights, 4)
    assert np.diff(kept.indptr).tolist() == [4] * 30 and kept.has_sorted_indices
    for before, after in zip(weights.toarray(), kept.toarray(), strict=True):
        assert sorted(after[after > 0]) == sorted(before)[-4:]


def test_nearest_items_equal_brute_force():
    rng = np.random.default_rng(2)
    embedding = rng.standard_normal((25, 4)).astype(np.float32)
    embedding[[3, 9]] = 0  # nothing known
    rows, cols = nearest(embedding, 5)
    similar = embedding @ embedding.T
    similar[:, [3, 9]] = -np.inf
    np.fill_diagonal(similar, -np.inf)
    for row in range(25):
        expected = set() if row in (3, 9) else set(np.argsort(-similar[row])[:5].tolist())
        assert set(cols[rows == row].tolist()) == expected


@pytest.mark.parametrize("known", [0, 1])
def test_without_another_known_item_nothing_is_similar(known):
    embedding = np.zeros((3, 2), np.float32)
    embedding[:known] = [1, 0]
    rows, cols = nearest(embedding, 5)
    assert len(rows) == len(cols) == 0
    assert CountedLog.of([seq(0, 1, 2)], embedding, nearest(embedding, 5)).cosine.nnz == 0


def test_ndcg_by_hand():
    """Places 1 and 3 of what is called up, a target that nothing calls up, and one with as good a rival."""
    weights = np.zeros((5, 5))
    weights[0, [1, 2, 3]] = [3, 2, 1]
    weights[4, [1, 2]] = 1
    histories = [seq(0), seq(0), seq(0), seq(4)]
    target = np.array([1, 3, 4, 2], dtype=np.int32)
    history = history_weights(histories, 5, 1.0)
    expected = pytest.approx([1, 1 / np.log2(4), 0, 1 / np.log2(3)])
    assert ndcg_of(history, sparse.csr_matrix(weights), target) == expected
    assert target_ndcg(history @ weights, target) == expected


def test_what_was_seen_neither_ranks_ahead_nor_is_found():
    """The target comes second to 1 until 1 was seen; a target that was seen is missed."""
    weights = np.zeros((4, 4))
    weights[0, [1, 2]] = [2, 1]
    weights[1, 0] = 9
    histories, target = [seq(0), seq(0, 1, 1), seq(1, 0)], np.array([2, 2, 1], dtype=np.int32)
    history = history_weights(histories, 4, 1.0)
    found = ndcg_of(history, sparse.csr_matrix(weights), target, seen_items(histories, 4))
    assert found == pytest.approx([1 / np.log2(3), 1, 0])


def test_the_coordinate_search_keeps_what_raises_the_score():
    grid = {"recency": (0.3, 2.0), "similar_weight": (0.0, 0.5)}
    start = JoinedSetting()
    best, score = coordinate_search(start, grid, lambda s: -abs(s.recency - 1.9) - s.similar_weight)
    assert best == replace(start, recency=2.0, similar_weight=0.0) and score == pytest.approx(-0.1)


def test_items_unseen_in_training_are_found_by_their_text(monkeypatch):
    texts = ["red mug", "blue mug", "", "red mug"]
    items = Items([f"i{i}" for i in range(4)], [t or None for t in texts], [None] * 4, [[] for _ in texts], [None] * 4)
    unit = {"red mug": [1.0, 0.0], "blue mug": [0.6, 0.8], "": [1.0, 0.0]}
    monkeypatch.setattr(
        "training.neighbours.embed_text", lambda texts, *_: np.array([unit[t] for t in texts], dtype=np.float32)
    )
    embedding = similarity_embedding(items, [seq(0, 1)], small_config(), None)
    assert embedding[2].tolist() == [0.0, 0.0]  # no text: like nothing
    weights = (
        CountedLog.of([seq(0, 1)], embedding, nearest(embedding, 4))
        .weights(JoinedSetting(similar_weight=1.0))
        .toarray()
    )
    assert weights[3, 0] == pytest.approx(1.0) and weights[3, 1] == pytest.approx(np.exp(-0.4 / 0.3), rel=1e-5)
    assert not weights[2].any() and not weights[:, 2].any()


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="neighbours.keep"):
        small_config("neighbours.keep=0")
    with pytest.raises(ConfigError, match="evaluation.dense_weights"):
        small_config("evaluation.dense_weights=[]")


def test_a_bundle_weighs_types_as_its_training_did(tmp_path, capsys):
    data, bundle = write_shop(tmp_path / "shop"), tmp_path / "bundle"
    first, *events = (data / "interactions.csv").read_text().splitlines()
    typed = [f"{event},{('look', 'cart', 'buy')[number % 3]}" for number, event in enumerate(events)]
    (data / "interactions.csv").write_text("\n".join([f"{first},type", *typed]) + "\n")
    asked = ("neighbours.enabled=true", "neighbours.parts=counted", "sft.steps=0", "rl.steps=0",
             "history.type_weights.look=0", "history.type_weights.buy=3")  # fmt: skip
    assert main(command("run", data, bundle, *asked)) == 0
    opened = Bundle.load(bundle)
    assert dict(opened.settings.type_weights) == {"look": 0.0, "buy": 3.0}
    assert opened.catalogue.popularity.sum() < 2 / 3 * len(events)  # what was only looked at does not count
    assert "the weight of the event's type, 0 for look, 3 for buy, and 1 of all others" in (
        bundle / "README.md"
    ).read_text().replace("\n", " ")
    capsys.readouterr()
    assert main(["evaluate", "--bundle", str(bundle), "--data", str(data), "--steps", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 60
    plain = write_shop(tmp_path / "plain")
    assert main(["evaluate", "--bundle", str(bundle), "--data", str(plain), "--steps", "0"]) == 2
    assert "no events of type 'buy'" in capsys.readouterr().err
    assert main(command("run", data, tmp_path / "other", "history.type_weights.buys=3")) == 2
    assert "no events of type 'buys'" in capsys.readouterr().err


def test_from_a_folder_to_a_bundle_and_its_accuracy(tmp_path, capsys):
    data, bundle = write_shop(tmp_path / "shop"), tmp_path / "bundle"
    asked = ("neighbours.enabled=true", "neighbours.keep=9", "neighbours.candidates=12")
    assert main(command("run", data, bundle, *asked)) == 0
    opened = Bundle.load(bundle)
    assert opened.neighbours is not None and np.diff(opened.neighbours.offsets).max() <= 9
    assert opened.neighbours_weight == 1.0 and opened.settings.gate is not None
    assert opened.settings.dense_candidates == 12
    assert opened.about["neighbours"]["entries"] == len(opened.neighbours.items)
    join = opened.about["neighbours"]["join"]
    assert join["way"] != "network alone" and join["valid_ndcg@10_with_the_way_cross_fitted"] > 0.5
    card = (bundle / "README.md").read_text()
    assert "score(j) = 1/alpha * log( g * exp(alpha * N(j)) + (1 - g) * share(j) ** beta )" in card
    assert f"beta = {opened.settings.gate.memory_power:.6g}\n" in card
    assert f"log(g / (1 - g)) = {opened.settings.gate.intercept:.6g}" in card
    capsys.readouterr()
    assert main(["evaluate", "--bundle", str(bundle), "--data", str(data), "--steps", "0", "--exclude-seen"]) == 0
    line = capsys.readouterr().out
    assert '"neighbours_weight": 1.0' in line
    assert json.loads(line)["ndcg@10"] > 0.5  # the memory knows the walk
