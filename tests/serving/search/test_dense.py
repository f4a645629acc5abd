"""The dense score through an index: that of all items if the index finds all, and close to it if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import bundle_writer
from serving.bundle import Bundle
from serving.engine import Engine
from serving.items.item_index import build_index
from serving.search import dense
from serving.search.dense import dense_score
from serving.types import Request, Rules, RuntimeName
from tests.answers import assert_same_answer
from tests.builders import GATE, tiny_bundle, tiny_model


def with_index(bundle: Bundle) -> Bundle:
    return replace(bundle, item_index=build_index(len(bundle.catalogue), bundle.vectors_of))


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), paths=st.integers(1, 3), gate=st.sampled_from([None, GATE]), near=st.sampled_from([0, 1])
)
def test_an_index_that_finds_all_changes_no_answer(
    runtime: RuntimeName, seed: int, paths: int, gate: object, near: int
) -> None:
    options = {"neighbours": True, "neighbours_weight": float(near), "gate": gate, "dense_candidates": 4}
    bundle = tiny_model(40, seed=seed, paths=paths, dense_weight=0.7, **options)
    rules = (Rules(), Rules(deny=tuple(range(0, 40, 3))), Rules(allow=(1, 2, 3)), Rules(categories=("even",)))
    requests = [Request((seed % 40, 1), 8, 8, 1, rule) for rule in rules]
    requests.append(replace(requests[0], dense_weight=0.0))
    found, expected = (
        engine.search(requests, engine.encode([request.history for request in requests]))
        for engine in (Engine(with_index(bundle), runtime=runtime), Engine(bundle, runtime=runtime))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_answer(ours, theirs)


@torch.inference_mode()
def test_the_partition_is_estimated_from_the_best_and_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_index(tiny_model(4000, sizes=(16, 16, 16), seed=1))
    engine = Engine(bundle)
    states = torch.randn(50, 2, 16, generator=torch.Generator().manual_seed(0))
    exact = dense_score(Engine(replace(bundle, item_index=None)).runtime, engine.trie, states, None, 0)
    monkeypatch.setattr("serving.network.eager.SAMPLED_ITEMS", 2000)
    found = dense_score(engine.runtime, engine.trie, states, None, 10)
    error = (found.log_partition - exact.log_partition).abs()
    assert error.mean() < 0.04 and error.max() < 0.15
    assert exact.best is None and found.best is not None and found.best.items.shape == (50, dense.BEST)
    torch.testing.assert_close(found.best.scores, found.of(engine.runtime, found.best.items), atol=1e-5, rtol=1e-5)


def test_explanations_name_the_nearest_items_of_the_index() -> None:
    bundle = tiny_model(40, dense_weight=0.5)
    request = Request((1, 2), 3, 10, 2, explain=True)
    found, expected = (
        engine.search([request], engine.encode([request.history]))[0].trace
        for engine in (Engine(with_index(bundle)), Engine(bundle))
    )
    assert found is not None and expected is not None and found.nearest_items == expected.nearest_items


def test_only_a_large_catalogue_with_a_dense_score_gets_an_index(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bundle(items: int, weight: float) -> Bundle:
        return Bundle.load(tiny_bundle(tmp_path_factory.mktemp("made") / "bundle", items, dense_weight=weight))

    monkeypatch.setattr(bundle_writer, "EXACT_ITEMS", 30)
    assert bundle(30, 0.5).item_index is None and bundle(31, 0.0).item_index is None
    opened = bundle(31, 0.5)
    assert opened.item_index is not None and opened.item_index.items == 31
    request = Request((1, 2), 5, 10, 1)
    found, expected = (
        engine.search([request], engine.encode([request.history]))[0]
        for engine in (Engine(opened), Engine(replace(opened, item_index=None)))
    )
    assert_same_answer(found, expected)
