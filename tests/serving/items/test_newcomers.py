"""Items that the graph does not know: their shares by the definition, and what their texts are nearest to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from serving.items.neighbours import NO_ITEM
from serving.items.newcomers import Newcomers, QuantizedItems
from serving.items.tokenizer import Codec
from tests.builders import random_neighbours

HISTORIES = [(0, 1, 2), (5,), (), (7, 3, 7, 9), (11, 4)]


@pytest.mark.parametrize("seed", range(4))
def test_a_newcomer_has_the_mean_share_of_those_it_is_like_and_changes_no_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_neighbours(30, seed, per_item=9, mixed=True)
    like = {row: rng.choice(30, int(rng.integers(1, 9)), replace=False).tolist() for row in (30, 31, 34, 40)}
    known, features = graph.shares(HISTORIES, 20)
    with_newcomers = replace(graph, newcomers=Newcomers())
    for row, items in like.items():
        with_newcomers.newcomers.add(row, items)
    found, same = with_newcomers.shares(HISTORIES, 20)
    before, after = known.dense(41), found.dense(41)
    np.testing.assert_array_equal(after[:, :30], before[:, :30])
    for row in range(30, 41):
        expected = before[:, like[row]].mean(1) if row in like else np.zeros(len(HISTORIES))
        np.testing.assert_allclose(after[:, row], expected, rtol=1e-6)
    assert all((np.diff(items[items < NO_ITEM]) > 0).all() for items in found.items)
    for name, values in features.items():
        np.testing.assert_array_equal(same[name], values)


def test_in_a_history_a_newcomer_counts_as_the_item_nearest_to_it() -> None:
    graph = replace(random_neighbours(30, 1, per_item=9), newcomers=Newcomers())
    graph.newcomers.add(33, [5, 7])
    ours, features = graph.shares([(2, 33), (33,)], 20)
    theirs, same = graph.shares([(2, 5), (5,)], 20)
    np.testing.assert_array_equal(ours.dense(34), theirs.dense(34))
    assert features["support"].tolist() == same["support"].tolist()
    unknown, _ = graph.shares([(35,)], 20)  # without a text
    assert not unknown.values.any()


def test_nearest_items_are_those_of_the_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    books = tuple(torch.randn(6, 4, generator=draw) for _ in range(3))
    codec = Codec("text", torch.zeros(4), torch.eye(4), (), (), books)
    codes = np.random.default_rng(0).integers(0, 6, (70, 4))  # of four levels, the last of which only tells apart
    vectors = sum(book[torch.from_numpy(codes[:, level])] for level, book in enumerate(books))
    items = QuantizedItems(codec, codes)
    for latent in torch.randn(5, 4, generator=draw):
        distance = (torch.as_tensor(vectors) - latent).norm(dim=1).numpy()
        found = items.nearest(latent, 9)
        np.testing.assert_allclose(distance[found], np.sort(distance)[:9], atol=1e-5)
    assert sorted(QuantizedItems(codec, codes[:3]).nearest(torch.zeros(4), 9)) == [0, 1, 2]


def test_in_a_large_catalogue_a_text_is_compared_with_items_of_the_nearest_first_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.items.newcomers.COMPARED", 25)
    books = tuple(10.0**-level * torch.eye(4)[:, :4] for level in range(2))
    codec = Codec("text", torch.zeros(4), torch.eye(4), (), (), books)
    codes = np.array([[row % 4, row % 3] for row in range(80)])  # 20 items have a first code
    found = QuantizedItems(codec, codes).nearest(torch.tensor([1.0, 0.5, 0.0, 0.0]), 80)
    assert sorted(found) == [row for row in range(80) if row % 4 in (0, 1)]  # one code has too few
    assert all(row % 4 == 0 for row in found[:20])
