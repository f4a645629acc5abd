"""Choosing the item memory: counted, linear or both, on validation users that do not judge what they chose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.types import EventData
from tests.training.small import small_config, small_workspace
from training import memory_choice
from training.data.prepare import Split, sample_users
from training.data.read import Items
from training.ids.embed import collaborative_embedding
from training.linear import LINEAR_GRID, LinearSetting
from training.memory import FittedMemory, fit_memory
from training.neighbours import JOINED_GRID, JoinedSetting

PARTS = ("counted", "linear", "both")


def items_without_text(count: int) -> Items:
    nothing = [None] * count
    return Items([f"i{row}" for row in range(count)], nothing, nothing, [[] for _ in range(count)], nothing)


def fit(split: Split, parts: str) -> FittedMemory:
    config = small_config("neighbours.enabled=true", f"neighbours.parts={parts}", "neighbours.keep=30")
    return fit_memory(items_without_text(30), split, config)


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    for grid in (JOINED_GRID, LINEAR_GRID):
        for name, values in grid.items():
            monkeypatch.setitem(grid, name, values[1:3])


@pytest.fixture(scope="module")
def split() -> Split:
    return small_workspace(small_config()).split


@pytest.mark.parametrize("parts", PARTS)
def test_every_kind_of_memory_finds_the_next_step_of_a_certain_walk(split: Split, parts: str) -> None:
    found = fit(split, parts)
    shares = found.whole.shares(split.test_history, 5)[0].dense(30)
    for row, history in enumerate(split.test_history):  # chosen for a ranking without them
        shares[row, history] = -np.inf
    assert (shares.argmax(1) == split.test_target).mean() > 0.9
    shares_tried = {"counted": (0.0,), "linear": (1.0,)}.get(parts, memory_choice.SHARES)
    assert found.report["setting"]["linear_share"] in shares_tried
    assert (found.report["users"], found.report["of"]) == (40, len(split.valid_target))


@pytest.mark.parametrize("parts", PARTS)
def test_users_who_come_back_to_what_they_saw_judge_a_memory_only_where_that_may_be_served(
    split: Split, parts: str
) -> None:
    again = replace(split, valid_target=np.array([history[-1] for history in split.valid_history]))
    assert fit(again, parts).report["valid_ndcg@10"] == 0
    permitted = small_config(
        "neighbours.enabled=true", f"neighbours.parts={parts}", "neighbours.keep=30", "evaluation.exclude_seen=false"
    )
    assert fit_memory(items_without_text(30), again, permitted).report["valid_ndcg@10"] > 0


@pytest.mark.parametrize("parts", PARTS)
def test_a_memory_listens_to_the_events_that_weigh_more(split: Split, parts: str) -> None:
    """Between any two steps of a walk comes an item by chance; only weights tell the two apart."""
    rng = np.random.default_rng(0)

    def noisy(history: np.ndarray) -> np.ndarray:
        return np.stack([rng.integers(0, 30, len(history)).astype(np.int32), history], 1).ravel()

    def events(histories: list[np.ndarray]) -> list[EventData]:
        return [EventData(np.tile(np.array([0.01, 1], np.float32), len(history) // 2)) for history in histories]

    mixed = replace(split, train=[*map(noisy, split.train)], valid_history=[*map(noisy, split.valid_history)])
    weighed = replace(mixed, train_events=events(mixed.train), valid_events=events(mixed.valid_history))
    alike, told = (fit(one, parts).report["valid_ndcg@10_cross_fitted"] for one in (mixed, weighed))
    assert told > alike + 0.02


@pytest.mark.parametrize("parts", PARTS)
def test_an_update_keeps_of_the_earlier_memory_what_validation_prefers(split: Split, parts: str) -> None:
    """There is an item more by now. Of a log of two users little can be counted; a shop that people used to walk the
    other way round says nothing of how they walk today."""
    config = small_config("neighbours.enabled=true", f"neighbours.parts={parts}", "neighbours.keep=30")
    earlier, items = fit(split, parts).whole, items_without_text(31)
    few = replace(split, train=split.train[:2])
    alone, kept = (fit_memory(items, few, config, earlier=memory) for memory in (None, earlier))
    assert len(kept.whole) == 31
    assert kept.report["setting"]["earlier_share"] > 0 == alone.report["setting"]["earlier_share"]
    assert kept.report["valid_ndcg@10_cross_fitted"] > alone.report["valid_ndcg@10_cross_fitted"] + 0.2

    backwards = replace(split, train=[sequence[::-1] for sequence in split.train])
    misled = fit_memory(items, split, config, earlier=fit(backwards, parts).whole)
    assert misled.report["setting"]["earlier_share"] < 0.5
    assert misled.report["valid_ndcg@10"] >= fit_memory(items, split, config).report["valid_ndcg@10"]


@pytest.mark.parametrize("parts", PARTS)
def test_nothing_is_learnt_from_the_test_targets(split: Split, parts: str) -> None:
    other = replace(split, test_history=split.test_history[::-1], test_target=split.test_target[::-1].copy())
    for name in ("offsets", "items", "weights", "recency"):
        np.testing.assert_array_equal(getattr(fit(split, parts).whole, name), getattr(fit(other, parts).whole, name))


def test_a_user_is_judged_with_a_memory_that_others_chose(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the users of one fold bought next changes nothing about the memory that judges them, and that of others."""
    users, _ = sample_users(list(range(len(split.valid_target))), split.valid_target, 40)
    first, second = (part for part, _ in fit(split, "both").folds)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(40))
    spoilt = split.valid_target.copy()
    spoilt[np.array(users)[first]] = np.random.default_rng(0).integers(0, 30, len(first))
    before, after = fit(split, "both"), fit(replace(split, valid_target=spoilt), "both")
    for name in ("offsets", "items", "weights", "recency"):
        np.testing.assert_array_equal(getattr(before.folds[0][1], name), getattr(after.folds[0][1], name))
    assert before.report["valid_ndcg@10_cross_fitted"] > after.report["valid_ndcg@10_cross_fitted"]
    assert before.folds[1][1].recency != after.folds[1][1].recency or not np.array_equal(
        before.folds[1][1].weights, after.folds[1][1].weights
    )


def test_a_memory_made_in_blocks_is_that_of_the_whole(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights have another unit: that of the rows that settings are compared on."""
    whole = fit(split, "counted").whole
    monkeypatch.setattr(memory_choice, "WHOLE_ITEMS", 20)
    monkeypatch.setattr(memory_choice, "BLOCK_ITEMS", 7)
    found = fit(split, "counted").whole
    for name in ("offsets", "items", "recency"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    ratio = found.weights / whole.weights
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    choice = memory_choice.MemoryChoice(items_without_text(30), split, small_config(), None, None, needs_counts=True)
    setting = memory_choice.MemorySetting(JoinedSetting(), LinearSetting(), linear_share=0.4, recency=1.0)
    rows = choice.rows[::3]
    np.testing.assert_allclose(
        choice._weights(setting, rows, choice.log_of(rows)).toarray(),
        choice._weights(setting)[rows].toarray(),
        rtol=1e-6,
    )


def test_an_embedding_that_is_at_hand_is_not_made_again(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    config, items = small_config("neighbours.parts=counted", "neighbours.keep=30"), items_without_text(30)
    expected = fit_memory(items, split, config).whole
    embedding = collaborative_embedding(split.train, 30, config.tokenizer.collaborative_dim, config.seed)
    monkeypatch.delattr("training.neighbours.collaborative_embedding")
    found = fit_memory(items, split, config, behaviour=embedding).whole
    for name in ("offsets", "items", "weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_numbers_of_the_linear_model_are_chosen_on_frequent_items_alone(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that is not frequent is missed, and the final weights cover all items."""
    monkeypatch.setattr(memory_choice, "TUNED_ITEMS", 10)
    shapes = []
    predict = memory_choice.predict
    monkeypatch.setattr(
        memory_choice, "predict", lambda moments, *rest: shapes.append(moments.gram.shape) or predict(moments, *rest)
    )
    found = fit(split, "linear")
    assert set(shapes) == {(10, 10)}
    assert len(np.unique(found.whole.items)) == 30
