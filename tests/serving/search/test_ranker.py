"""Full ranking of many histories: equal to brute force, in batches, with settings and exclusions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.reference import Reference, score_all_items
from serving.search import ranker as module
from tests.builders import ranker_of, tiny_model

HISTORIES = [np.array(h, dtype=np.int32) for h in ([1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2], [11, 1])]


@pytest.mark.parametrize("dense", [0.0, 0.8])
def test_the_ranking_equals_brute_force(dense, monkeypatch):
    monkeypatch.setitem(module.BATCH_SIZE, "cpu", 3)  # several batches, in another order than the histories
    bundle = tiny_model(14, seed=3, suffix_tokens=(1,), dense_weight=dense)
    found = ranker_of(bundle).rank(HISTORIES, 0, 64)
    for row, history in enumerate(HISTORIES):
        scores, _ = score_all_items(bundle, tuple(history.tolist()), (), dense)
        np.testing.assert_allclose(scores[found[row]], np.sort(scores)[::-1][:10], atol=1e-4)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_ranking_by_state_is_that_of_the_dense_score(steps, monkeypatch):
    monkeypatch.setitem(module.BATCH_SIZE, "cpu", 3)
    bundle = tiny_model(14, seed=3, age_bias=True, item_input=True)
    found = ranker_of(bundle).rank_by_state(HISTORIES, steps)
    for row, history in enumerate(HISTORIES):
        reference = Reference(bundle, history.tolist(), steps)
        dense = reference.dense(reference.paths()[0])
        np.testing.assert_allclose(dense[found[row]], np.sort(dense)[::-1][:10], atol=1e-5)


def test_the_ranking_by_state_leaves_out_what_was_seen():
    ranker = ranker_of(tiny_model(14, seed=3))
    permitted = ranker.rank_by_state(HISTORIES, 0)
    found = ranker.rank_by_state(HISTORIES, 0, exclude_seen=True)
    assert any(set(ranked) & set(seen) for ranked, seen in zip(permitted.tolist(), map(list, HISTORIES), strict=True))
    for row, history in enumerate(HISTORIES):
        seen = set(history.tolist())
        left = [item for item in permitted[row].tolist() if item not in seen]
        real = [item for item in found[row].tolist() if item >= 0]
        assert real[: len(left)] == left and not set(real) & seen
        assert len(real) == min(10, 14 - len(seen))


def test_no_history_gives_an_empty_ranking():
    assert ranker_of(tiny_model(14, seed=3)).rank([], 0, 4).shape == (0, 10)


def test_seen_items_are_excluded_before_the_beam_is_cut():
    ranker = ranker_of(tiny_model(14, seed=3))
    found = ranker.rank(HISTORIES, 2, 64, exclude_seen=True)
    for row, history in enumerate(HISTORIES):
        left = set(range(14)) - set(history.tolist())
        real = found[row][found[row] >= 0]
        assert len(set(real.tolist())) == len(real) == min(10, len(left))  # the third user has 6 left: the rest is -1
        assert set(real.tolist()) <= left
    assert set(ranker.rank(HISTORIES, 2, 64)[0].tolist()) & {1, 2, 3}


def test_settings_reach_the_search_and_the_trie_is_kept():
    ranker = ranker_of(tiny_model(14, seed=3))
    shorter = replace(ranker, settings=replace(ranker.settings, max_items=2))
    assert shorter.trie is ranker.trie and shorter.rules is ranker.rules
    cut = [history[-2:] for history in HISTORIES]
    np.testing.assert_array_equal(shorter.rank(HISTORIES, 0, 64), shorter.rank(cut, 0, 64))
    assert (shorter.rank(HISTORIES, 0, 64) != ranker.rank(HISTORIES, 0, 64)).any()


def test_the_item_graph_decides_under_a_huge_weight_and_does_nothing_without_one():
    bundle = tiny_model(14, seed=3, neighbours=True)
    without = ranker_of(bundle)
    joined = replace(without, settings=replace(without.settings, neighbours_weight=1e6))
    assert bundle.neighbours is not None
    scores = bundle.neighbours.shares(HISTORIES, without.settings.max_items)[0].dense(14)
    best = joined.rank(HISTORIES, 0, 64)[:, 0]
    np.testing.assert_allclose(scores[np.arange(len(best)), best], scores.max(1))
    np.testing.assert_array_equal(
        without.rank(HISTORIES, 0, 64), replace(without, neighbours=None).rank(HISTORIES, 0, 64)
    )
    np.testing.assert_array_equal(
        without.rank(HISTORIES, 0, 64), replace(joined, neighbours=None).rank(HISTORIES, 0, 64)
    )
