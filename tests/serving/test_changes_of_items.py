"""An engine whose catalogue changes answers like one that had that catalogue from the beginning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bundle import Bundle
from serving.engine import Engine
from serving.items.catalogue import Catalogue
from serving.search.cuda_graph import GraphSearch
from serving.types import Answer, Request, Rules
from tests.answers import assert_same_answer
from tests.builders import GATE, random_codes, tiny_model
from tests.serving.search.test_cuda_graph import run_again

SIZES = (6, 5, 4)


def spare_tokens(bundle: Bundle) -> list[list[int]]:
    """Semantic IDs that no item has."""
    taken = set(map(tuple, bundle.catalogue.tokens.tolist()))
    every = bundle.vocabulary.tokens_of(random_codes(int(np.prod(SIZES)), SIZES, 9))
    return [tokens for tokens in every.tolist() if tuple(tokens) not in taken]


def copied(catalogue: Catalogue) -> Catalogue:
    """A catalogue that was so from the beginning."""
    return Catalogue(
        list(catalogue.item_ids), catalogue.tokens.copy(), list(catalogue.titles),
        [list(names) for names in catalogue.categories], catalogue.popularity.copy(), dict(catalogue.subsets),
    )  # fmt: skip


def change(engine: Engine, rows: list[int]) -> None:
    """What the service does: rows are refreshed, and where there is no room an index with room is adopted."""
    if engine.refresh(rows):
        assert engine.adopt(engine.with_room()) == []


def answers(engine: Engine, requests: list[Request]) -> list[Answer]:
    return engine.search(requests, engine.encode([request.history for request in requests]))


def pairs(answer: Answer) -> list[tuple[int, float]]:
    return list(zip(answer.items, answer.scores, strict=True))


def some_request(rng: np.random.Generator, catalogue: Catalogue, denied: list[int]) -> tuple[Request, Request]:
    """A request, and the same with more items denied."""
    rows = len(catalogue)
    history = tuple(rng.integers(0, rows, int(rng.integers(1, 8))).tolist())
    rules = Rules(
        exclude=history if rng.random() < 0.5 else (),
        allow=tuple(rng.integers(0, rows, 30).tolist()) if rng.random() < 0.3 else None,
        categories=("even",) if rng.random() < 0.3 else (),
        catalogue="small" if rng.random() < 0.2 else None,
    )
    request = Request(history, 60, 60, 2, rules, explore=5)
    return request, replace(request, rules=replace(rules, deny=tuple(denied)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), mixed=st.booleans(), on_graphs=st.booleans())
def test_a_catalogue_that_changed_is_searched_like_one_that_was_so(seed: int, mixed: bool, on_graphs: bool) -> None:
    """Added, removed and described items, with rules, item memory and recorded searches, before and after a new
    index."""
    memory = {"neighbours": True, "neighbours_weight": 1.0, "dense_candidates": 5, "gate": GATE} if mixed else {}
    bundle = tiny_model(60, sizes=SIZES, seed=seed % 7, **memory)
    engine, rng, catalogue = Engine(bundle), np.random.default_rng(seed), bundle.catalogue
    if on_graphs:
        engine.graphs = GraphSearch(engine.runtime, engine.trie, bundle.search_settings, run_again)
    spare = spare_tokens(bundle)
    for round_ in range(3):
        rows = [catalogue.add(f"n{round_}{n}", spare.pop(), None, ["even", "new"][n % 2 :]) for n in range(4)]
        for row in rng.integers(0, len(catalogue), 12).tolist():
            catalogue.listed[row] = not catalogue.listed[row]
            rows.append(row)
        described = int(rng.integers(len(catalogue)))
        catalogue.describe(described, "other", ["odd"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "serving.engine.GraphSearch",
                lambda *parts: GraphSearch(*parts, capture=run_again) if on_graphs else None,
            )
            change(engine, [*rows, described])
            if round_ == 1:
                index = engine.with_room()
                late = int(rng.integers(len(catalogue)))
                catalogue.listed[late] = not catalogue.listed[late]
                assert engine.refresh([late]) == [] and engine.adopt(index) == []
        fresh = Engine(replace(bundle, catalogue=copied(catalogue)))
        unlisted = np.flatnonzero(~catalogue.listed).tolist()
        requests, denying = zip(*(some_request(rng, catalogue, unlisted) for _ in range(4)), strict=True)
        for ours, theirs in zip(answers(engine, list(requests)), answers(fresh, list(denying)), strict=True):
            assert_same_answer(pairs(ours), pairs(theirs))
            assert catalogue.listed[ours.items].all()


@pytest.mark.parametrize("dense_candidates", [0, 8])
def test_changes_move_no_dense_score_and_an_added_item_has_one(dense_candidates: int) -> None:
    bundle = tiny_model(60, sizes=SIZES, dense_weight=0.7, dense_candidates=dense_candidates, seed=3)
    before, engine = (
        Engine(tiny_model(60, sizes=SIZES, dense_weight=0.7, dense_candidates=dense_candidates, seed=3)),
        (Engine(bundle)),
    )
    catalogue, request = bundle.catalogue, Request((1, 2, 3), 70, 70, 2, explain=True)
    new = catalogue.add("new", spare_tokens(bundle)[0], "New", ["even"])
    catalogue.listed[7] = False
    change(engine, [new, 7])
    [theirs], [ours] = answers(before, [replace(request, rules=Rules(deny=(7,)))]), answers(engine, [request])
    without_new = [(item, score) for item, score in pairs(ours) if item != new]
    assert new in ours.items
    assert_same_answer(without_new, pairs(theirs))
    assert ours.trace is not None and theirs.trace is not None
    # dense = <s, v> / sqrt(D) - log Z is linear in cosine times |v|, with what two other items fix.
    lengths = engine.runtime.vectors_of(torch.tensor(ours.items)).norm(dim=1).tolist()
    products = [cosines[-1] * length for cosines, length in zip(ours.trace.similarity, lengths, strict=True)]
    dense, index = ours.trace.dense_scores, ours.items.index(new)
    a, b = [i for i in (0, 10, 20) if i != index][:2]
    slope = (dense[a] - dense[b]) / (products[a] - products[b])
    assert dense[index] == pytest.approx(dense[a] + slope * (products[index] - products[a]), abs=1e-3)
    assert all(7 not in nearest for nearest in ours.trace.nearest_items)


@pytest.mark.parametrize("explain", [False, True])
def test_new_items_are_found_besides_by_a_search_of_them_alone(explain: bool) -> None:
    bundle = tiny_model(60, sizes=SIZES, neighbours=True, neighbours_weight=1.0, gate=GATE, dense_candidates=5)
    engine, catalogue, spare = Engine(bundle), bundle.catalogue, spare_tokens(bundle)
    rows = [catalogue.add(f"n{n}", spare.pop(), None, ["even"]) for n in range(9)]
    rows.append(int(catalogue.popularity.argmin()))  # in the bundle, and nobody had it
    change(engine, rows)
    histories = [(1, 2, 3), (rows[0], 5), (7,)]
    rules = [Rules(), Rules(exclude=(rows[0],)), Rules(categories=("even",), deny=tuple(rows[1:3]))]
    plain = [Request(*each, explain=explain) for each in zip(histories, [8] * 3, [20] * 3, [2] * 3, rules, strict=True)]
    explored = [replace(request, explore=4) for request in plain]
    alone = [replace(request, rules=replace(request.rules, allow=tuple(rows))) for request in plain]
    for found, ordinary, new in zip(*(answers(engine, each) for each in (explored, plain, alone)), strict=True):
        assert_same_answer(pairs(found)[: len(ordinary.items)], pairs(ordinary))
        expected = [pair for pair in pairs(new)[:4] if pair[0] not in ordinary.items]
        assert_same_answer(pairs(found)[len(ordinary.items) :], expected)
        if explain:
            assert found.trace is not None and ordinary.trace is not None
            assert found.trace.reasoning_tokens == ordinary.trace.reasoning_tokens
            lengths = {len(found.trace.token_log_probs), len(found.trace.dense_scores), len(found.trace.similarity)}
            assert lengths == {len(found.items), len(found.trace.neighbour_scores)}
    assert explored[0].beam_rows == 2 * plain[0].beam_rows == 40


def test_an_item_without_room_is_left_out_until_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.LEAST_ROOM", 2)
    monkeypatch.setattr("serving.engine.ROOM_SHARE", 0.0)
    bundle = tiny_model(60, sizes=SIZES)
    engine, catalogue, spare = Engine(bundle), bundle.catalogue, spare_tokens(bundle)
    assert engine.room == 0.0 and engine.refresh([3]) == [3]  # nothing has changed so far: there is no room at all
    engine.adopt(engine.with_room())
    assert engine.room == 1.0
    rows = [catalogue.add(f"n{n}", spare.pop(), None, ["even"]) for n in range(4)]
    left_out = engine.refresh(rows)
    assert left_out == rows[2:] and engine.room <= 0
    history = (1, *rows)  # items without room can be read, and excluded, all the same
    [answer] = answers(engine, [Request(history, 70, 70, 0, Rules(exclude=(rows[0], rows[3])))])
    assert rows[1] in answer.items and not {rows[0], *left_out} & set(answer.items)
    assert engine.adopt(engine.with_room()) == []
    [answer] = answers(engine, [Request(history, 70, 70, 0)])
    assert set(rows) <= set(answer.items)
