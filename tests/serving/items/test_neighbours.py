"""The shares of the item graph: a case worked out by hand, the reference, and files that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.errors import BundleError
from serving.items.neighbours import NO_ITEM, Neighbours, read_neighbours, write_neighbours
from serving.reference import Reference
from serving.types import EventData
from tests.builders import random_neighbours, tiny_model

# 0 -> 1 (w 3), 0 -> 2 (w 1), 1 -> 2 (w 2); items 2 and 3 have no neighbours.
BY_HAND = Neighbours(
    np.array([0, 2, 3, 3, 3]), np.array([1, 2, 2], np.int32), np.array([3, 1, 2], np.float32), recency=1.0, floor=0.1
)


def test_shares_of_a_case_worked_out_by_hand():
    found, _ = BY_HAND.shares([(0, 1), (1, 0), (3, 2), (), (0, 0)], max_items=20)
    assert found.items.tolist() == [[1, 2], [1, 2], [NO_ITEM] * 2, [NO_ITEM] * 2, [1, 2]]
    assert found.values.dtype == np.float32
    nothing = [0, 0, 0, 0]
    expected = [
        [0, 1.5 / 4, 2.5 / 4, 0],  # 1 is the newest: w(1, .) whole, w(0, .) halved
        [0, 3 / 5, 2 / 5, 0],
        nothing,
        nothing,
        [0, 0.75, 0.25, 0],
    ]
    np.testing.assert_allclose(found.dense(4), expected, rtol=1e-6)
    wanted = np.array([[2, 0], [1, 1], [1, 2], [3, 0], [3, 2]])
    np.testing.assert_array_equal(found.of(wanted), np.take_along_axis(found.dense(4), wanted, 1))


def test_shares_and_features_of_a_case_worked_out_by_hand():
    """Item 1 speaks against item 2 this time; items 2 and 3 say nothing."""
    signed = replace(BY_HAND, weights=np.array([3, 1, -2], np.float32))
    found, features = signed.shares([(0, 1), (1, 0), (3, 2), (), (0, 0)], max_items=20)
    expected = [
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0.75, 0.25, 0],
    ]  # (1, 0): n is 3 and 1 - 2/2
    np.testing.assert_allclose(found.dense(4), expected, rtol=1e-6)
    total = np.array([1.5, 3.0, 0, 0, 6.0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(features["support"], np.log(total))
    np.testing.assert_allclose(features["peak"], [1, 1, 0, 0, 0.75])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(features["entropy"], [0, 0, 0, 0, entropy], atol=1e-12)
    np.testing.assert_allclose(features["length"], np.log([2, 2, 2, 1, 2]))
    np.testing.assert_allclose(signed.shares([(0,) * 30], max_items=20)[1]["length"], np.log([20]))


def test_events_weigh_in_a_case_worked_out_by_hand():
    """0 counts three times as much as 1, and in the other history everything is as ever."""
    events = [EventData(np.array([3, 1], np.float32)), None]
    found, _ = BY_HAND.shares([(0, 1), (0, 1)], max_items=20, events=events)
    np.testing.assert_allclose(found.dense(4), [[0, 4.5 / 8, 3.5 / 8, 0], [0, 1.5 / 4, 2.5 / 4, 0]], rtol=1e-6)
    newest, _ = BY_HAND.shares([(0, 0, 1)], max_items=2, events=[EventData(np.array([7, 3, 1], np.float32))])
    np.testing.assert_array_equal(newest.dense(4)[0], found.dense(4)[0])


def test_only_the_last_items_count():
    short, long = BY_HAND.shares([(0, 0, 1), (1,)], max_items=1)[0], BY_HAND.shares([(1,), (1,)], max_items=20)[0]
    np.testing.assert_array_equal(short.dense(4), long.dense(4))


def test_shares_are_those_of_the_reference_alone_and_in_any_batch():
    bundle, rng = tiny_model(50, seed=4, neighbours=True), np.random.default_rng(0)
    histories = [tuple(rng.integers(0, 50, length).tolist()) for length in (0, 1, 4, 9, 5)]
    together = bundle.neighbours.shares(histories, bundle.max_items)[0].dense(50)
    for row, history in zip(together, histories, strict=True):
        np.testing.assert_array_equal(row, bundle.neighbours.shares([history], bundle.max_items)[0].dense(50)[0])
        np.testing.assert_allclose(row, Reference(bundle, history, 0).shares()[0], atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "recency", "floor"),
    [
        ({"items": np.array([1, 2, 4], np.int32)}, 1.0, 0.1),
        ({"items": np.array([-1, 2, 2], np.int32)}, 1.0, 0.1),
        ({"items": np.array([1, 2, 2])}, 1.0, 0.1),
        ({"weights": np.array([1, np.nan, 2], np.float32)}, 1.0, 0.1),
        ({"weights": np.array([1, 2], np.float32)}, 1.0, 0.1),
        ({"offsets": np.array([0, 3, 2, 3, 3])}, 1.0, 0.1),
        ({"offsets": np.array([0, 2, 3, 3])}, 1.0, 0.1),
        ({"offsets": np.array([1, 2, 3, 3, 3])}, 1.0, 0.1),
        ({}, 1.0, 0.0),
        ({}, float("nan"), 0.1),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, spoil: dict, recency: float, floor: float):
    arrays = {"offsets": BY_HAND.offsets, "items": BY_HAND.items, "weights": BY_HAND.weights} | spoil
    write_neighbours(tmp_path / "n.safetensors", Neighbours(**arrays, recency=recency, floor=floor))
    with pytest.raises(BundleError, match=r"n\.safetensors does not contain neighbours of this catalogue; export"):
        read_neighbours(tmp_path / "n.safetensors", 4, recency, floor)


def test_what_is_written_is_read_back(tmp_path: Path):
    made = random_neighbours(30)
    write_neighbours(tmp_path / "n.safetensors", made)
    found = read_neighbours(tmp_path / "n.safetensors", 30, made.recency, made.floor)
    for name in ("offsets", "items", "weights", "recency", "floor"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
