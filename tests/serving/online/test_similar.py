"""Similar items against their definitions, rules, and a catalogue that grows."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from serving.bundle import Bundle
from serving.errors import Overloaded, RequestError, UnknownCatalogue
from serving.online import scans, similar
from serving.online.similar import Similar, SimilarItems
from serving.types import AlikeBy, Rules
from tests.builders import GATE, tiny_model
from tests.waiting import DEADLINE

NO_RULES = Rules()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_model(neighbours=True, gate=GATE)


def find(items: SimilarItems, item: int, k: int, by: AlikeBy | None = None, rules: Rules = NO_RULES) -> list[Similar]:
    return asyncio.run(items.find(item, rules, k, by))


def by_cosine(bundle: Bundle, item: int) -> list[int]:
    """All others, the closest first."""
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    trained = bundle.network.heads.item_free.num_embeddings
    with torch.no_grad():
        vectors = bundle.network.t5.shared(tokens).sum(1).double()
        vectors[:trained] += bundle.network.heads.item_free.weight
    cosine = torch.nn.functional.cosine_similarity(vectors, vectors[item, None], dim=1)
    return [row for row in cosine.argsort(descending=True).tolist() if row != item]


def together(bundle: Bundle, item: int) -> dict[int, float]:
    """The positive weights of an item's row of the item graph, as shares; the largest first."""
    graph = bundle.neighbours
    assert graph is not None
    row = slice(graph.offsets[item], graph.offsets[item + 1])
    weights = {
        other: weight
        for other, weight in zip(graph.items[row].tolist(), graph.weights[row].tolist(), strict=True)
        if weight > 0
    }
    total = sum(weights.values())
    return {
        other: weights[other] / total for other in sorted(weights, key=lambda each: -weights[each]) if other != item
    }


@pytest.mark.parametrize("k", [1, 7, 59, 100])
def test_content_is_the_cosine_of_the_vectors(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(similar, "BLOCK", 16)  # four blocks
    found = find(SimilarItems(bundle), 5, k, "content")
    assert [each.item for each in found] == by_cosine(bundle, 5)[:k]
    assert {each.by for each in found} == {"content"}
    assert found[0].score == pytest.approx(
        float(np.prod(bundle.unit_vectors([5, found[0].item]), axis=0).sum()), abs=1e-5
    )
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_together_is_the_items_row_of_the_item_graph(bundle: Bundle) -> None:
    items = SimilarItems(bundle)
    for item in range(60):
        expected = together(bundle, item)
        found = find(items, item, 60, "together")
        assert [(each.item, pytest.approx(each.score, abs=1e-6)) for each in found] == list(expected.items())
        assert find(items, item, 1, "together") == found[:1]


def test_content_follows_what_was_taken_together_until_there_are_k(bundle: Bundle) -> None:
    item = max(range(60), key=lambda row: len(together(bundle, row)))
    first = list(together(bundle, item))
    rest = [row for row in by_cosine(bundle, item) if row not in first]
    found = find(SimilarItems(bundle), item, 10)
    assert [each.item for each in found] == (first + rest)[:10] and len(first) > 1
    assert [each.by for each in found] == ["together"] * len(first) + ["content"] * (10 - len(first))


def test_rules_hold_for_both_kinds(bundle: Bundle) -> None:
    items, item = SimilarItems(bundle), max(range(60), key=lambda row: len(together(bundle, row)))
    first = list(together(bundle, item))
    expected = first + [row for row in by_cosine(bundle, item) if row not in first]
    for rules in (Rules(deny=(expected[0], expected[5])), Rules(categories=("odd",)), Rules(catalogue="small"),
                  Rules(allow=(expected[0], expected[9], item)), Rules(allow=())):  # fmt: skip
        permitted = bundle.catalogue.permitted(rules)
        assert [each.item for each in find(items, item, 60, rules=rules)] == [row for row in expected if permitted[row]]
    with pytest.raises(UnknownCatalogue):
        find(items, item, 1, rules=Rules(catalogue="nowhere"))
    with pytest.raises(RequestError, match="No item is in one of these"):
        find(items, item, 1, "together", Rules(categories=("nothing",)))


def test_a_model_without_an_item_graph_has_content_alone() -> None:
    bundle = tiny_model()
    items = SimilarItems(bundle)
    assert [each.item for each in find(items, 5, 7)] == by_cosine(bundle, 5)[:7]
    with pytest.raises(RequestError, match="no item graph") as caught:
        find(items, 5, 7, "together")
    assert caught.value.field == "by"


def test_items_that_come_and_go_are_compared_at_once() -> None:
    bundle = tiny_model(30, neighbours=True, gate=GATE)
    items, free = SimilarItems(bundle), bundle.network.heads.item_free
    find(items, 5, 30, "content")
    free.weight.data[5] = 0  # so that an item with these tokens is exactly alike
    items = SimilarItems(bundle)
    find(items, 5, 30, "content")
    twin = bundle.catalogue.add("twin", bundle.catalogue.tokens[5].tolist(), "Twin", ["even"])
    assert find(items, 5, 1, "content") == [Similar(twin, pytest.approx(1.0, abs=1e-5), "content")]
    assert [each.item for each in find(items, twin, 30)] == [5, *by_cosine(bundle, 5)[1:]]  # nobody took it with others
    bundle.catalogue.listed[twin] = False
    assert twin not in [each.item for each in find(items, 5, 30)]
    assert find(items, twin, 1)[0].item == 5


def test_one_comparison_runs_at_a_time_and_too_many_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, opened, running, most = SimilarItems(bundle), threading.Event(), [], []
    compare = items._compare

    def held(*arguments: object) -> list[Similar]:
        running.append(1)
        most.append(len(running))
        assert opened.wait(DEADLINE)
        running.pop()
        return compare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(items, "_compare", held)
    monkeypatch.setattr(scans, "MAX_WAITING", 3)

    async def go() -> None:
        asked = [asyncio.create_task(items.find(5, Rules(), 3, "content")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="try again"):
            await items.find(5, Rules(), 3, "content")
        opened.set()
        answers = await asyncio.gather(*asked)
        assert answers[0] == answers[1] == answers[2]
        assert await items.find(5, Rules(), 3, "content") == answers[0]

    asyncio.run(go())
    assert most == [1, 1, 1, 1]
