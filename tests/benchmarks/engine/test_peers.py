"""The comparison with peers on tiny models: contenders give the answers they should, the floor counts all products."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine import peers_measure as measured
from benchmarks.engine.answers import Paths, overlap, same_answers
from benchmarks.engine.contenders import Case, Contender, Model, make_case, make_model, ours, rescore
from benchmarks.engine.contenders_ctranslate2 import translate
from benchmarks.engine.contenders_transformers import (
    TrieMask,
    generate_greedy_reasoning,
    generate_with_function,
    generate_with_mask,
)
from benchmarks.engine.floor import Product, in_onnx, in_order, in_torch, products_of_search
from benchmarks.engine.peers import bars, plot
from benchmarks.engine.sizes import clustered_codes
from serving.items.vocabulary import END, Vocabulary
from serving.network.eager import EagerRuntime
from serving.network.onnx import OnnxRuntime
from serving.network.t5 import ModelConfig

VOCABULARY = Vocabulary(max_steps=2, codebook_sizes=(12, 12, 12), reasoning_codes=7)
CONFIG = ModelConfig(VOCABULARY.size, 16, 8, 32, num_layers=2, num_decoder_layers=2, num_heads=2)
BEAMS = 6
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(CONFIG, VOCABULARY, clustered_codes(300, 3, 12, seed=1), seed=2)


def eager(model: Model) -> EagerRuntime:
    return EagerRuntime(model.network, model.item_tokens, "bidirectional")


def answer(contender: Contender, case: Case) -> Paths:
    with torch.inference_mode():
        return contender.read(contender.answer(case), case)


@pytest.mark.parametrize("batch", [1, 3])
def test_without_reasoning_every_constrained_contender_finds_what_ours_finds(model, batch):
    case = make_case(model, 0, batch, BEAMS, seed=3)
    expected = answer(ours(model, eager(model)), case)
    torch.testing.assert_close(rescore(model, case, expected.tokens), expected.scores, atol=TOLERANCE, rtol=0)
    onnx = OnnxRuntime(model.network, model.item_tokens, "bidirectional")
    for contender in (generate_with_function(model), generate_with_mask(model), ours(model, onnx)):
        assert same_answers(answer(contender, case), expected, TOLERANCE)


def test_greedy_reasoning_by_generate_is_our_single_path(model):
    case = make_case(model, 2, 2, BEAMS, seed=4)
    assert same_answers(
        answer(generate_greedy_reasoning(model), case), answer(ours(model, eager(model)), case), TOLERANCE
    )


def test_generate_spends_its_beams_on_reasoning_too(model):
    case = make_case(model, 2, 2, BEAMS, seed=5)
    found = answer(generate_with_function(model), case)
    lo, hi = VOCABULARY.reasoning_range
    items = {tuple(item) for item in model.item_tokens.tolist()}
    assert found.tokens.shape == (2, BEAMS, 2 + 3)
    for path in found.tokens.flatten(0, 1).tolist():
        assert all(lo <= token < hi for token in path[:2]) and tuple(path[2:]) in items
    torch.testing.assert_close(rescore(model, case, found.tokens), found.scores, atol=TOLERANCE, rtol=0)
    assert same_answers(answer(generate_with_mask(model), case), found, TOLERANCE)


@pytest.mark.parametrize("steps", [0, 2])
def test_ctranslate2_runs_the_same_network_over_every_token(model, steps):
    case = make_case(model, steps, 2, BEAMS, seed=6)
    found = answer(translate(model), case)
    assert found.tokens.shape == (2, BEAMS, steps + 3)
    expected = rescore(model, case, found.tokens, without=END)
    torch.testing.assert_close(expected, found.scores, atol=TOLERANCE, rtol=0)


def test_the_vectorised_mask_allows_exactly_the_continuations(model):
    mask, items = TrieMask(model, opening=1, steps=1), model.item_tokens.tolist()
    scores = torch.randn(20, VOCABULARY.size)
    start = torch.full((20, 1), 3)
    lo, hi = VOCABULARY.reasoning_range
    masked = mask(start, scores)
    assert set(masked[0].isfinite().nonzero().flatten().tolist()) == set(range(lo, hi))
    for level in range(3):
        prefixes = [items[row][:level] for row in range(20)]
        path = torch.cat([start, torch.full((20, 1), lo), torch.tensor(prefixes, dtype=torch.int64)], 1)
        masked = mask(path, scores)
        for row, prefix in enumerate(prefixes):
            allowed = sorted({item[level] for item in items if item[:level] == prefix})
            assert masked[row].isfinite().nonzero().flatten().tolist() == allowed
            torch.testing.assert_close(masked[row, allowed], scores[row, allowed])


def test_answers_may_differ_in_ties_at_the_end_and_nowhere_else():
    tokens = torch.tensor([[[1, 2], [3, 4], [5, 6]]])
    scores = torch.tensor([[-1.0, -2.0, -2.00001]])
    expected = Paths(tokens, scores)
    assert same_answers(Paths(tokens[:, [0, 2, 1]], scores), expected, TOLERANCE)
    tied = tokens.clone()
    tied[0, 2] = torch.tensor([7, 8])
    assert same_answers(Paths(tied, scores), expected, TOLERANCE)
    other = tokens.clone()
    other[0, 0] = torch.tensor([7, 8])
    assert not same_answers(Paths(other, scores), expected, TOLERANCE)
    assert not same_answers(Paths(tokens[:, [1, 0, 2]], scores), expected, TOLERANCE)
    assert not same_answers(Paths(tokens, scores + 0.001), expected, TOLERANCE)
    assert not same_answers(Paths(tokens[:, :2], scores[:, :2]), expected, TOLERANCE)
    assert overlap(Paths(other, scores), expected) == pytest.approx(2 / 3)


def test_clustered_codes_are_distinct_and_clustered():
    codes = clustered_codes(2000, 4, 16, seed=0)
    assert codes.shape == (2000, 4) and len(np.unique(codes, axis=0)) == 2000
    assert codes.min() == 0 and codes.max() == 15
    shares = np.sort(np.bincount(codes[:, 0], minlength=16))[::-1] / 2000
    assert shares[0] > 2.5 / 16
    with pytest.raises(ValueError, match="fewer items"):
        clustered_codes(300, 2, 16, seed=0)


def test_the_floor_counts_what_a_hand_counts():
    assert Product("weights", 3, 5, 7, 11).flops == 3 * 2 * 5 * 7 * 11
    assert Product("pairs", 3, 5, 7, 11, batch=2).flops == 2 * 3 * 2 * 5 * 7 * 11
    config = ModelConfig(vocab_size=10, d_model=4, d_kv=3, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2)
    memory, start, every_id, state, beams, block = products_of_search(
        config, 5, 2, batch=1, steps=0, paths=1, beams=3, blocks=(10, 6)
    )
    assert memory.flops == 2 * (2 * 5 * 4 * 6)
    assert state.flops == 2 * (2 * 1 * 4 * 4)
    assert (every_id.flops, block.flops) == (1 * 2 * 4 * 10, 3 * 2 * 4 * 6)
    # a row's own products: q, k, v, o and cross q, o; feed forward
    row = 6 * 2 * 4 * 6 + 2 * 2 * 4 * 8
    # 2 heads, scores and mix, over the rows written so far and over the history
    assert start.flops == 1 * (row + 2 * 2 * 2 * 3 * (1 + 5))
    assert beams.flops == 3 * (row + 2 * 2 * 2 * 3 * (1 + 3 + 5))


@pytest.mark.parametrize(
    ("steps", "paths", "blocks"), [(0, 1, None), (2, 1, None), (2, 3, None), (2, 1, (7, 7, 12, 12, 12))]
)
def test_the_floor_is_what_the_search_multiplies(model, steps, paths, blocks):
    case = make_case(model, steps, 2, BEAMS, seed=7)
    passes = products_of_search(
        CONFIG, case.tokens.shape[1], 3, batch=2, steps=steps, paths=paths, beams=BEAMS, blocks=blocks
    )
    expected = sum(one.flops for one in passes)
    contender = ours(model, eager(model), paths, "vocabulary" if blocks is None else "block")
    with torch.no_grad(), FlopCounterMode(display=False) as searched:
        contender.answer(dataclasses.replace(case, hidden=case.hidden.clone()))
    assert searched.get_total_flops() == expected
    run = in_order(in_torch(passes))
    with FlopCounterMode(display=False) as alone:
        run()
    assert alone.get_total_flops() == expected
    in_order(in_onnx(passes))()


def test_every_table_and_bar_has_its_rows(tmp_path):
    rows = measured.measure(
        "tiny", CONFIG, VOCABULARY, 300, ((1, BEAMS), (2, BEAMS)), (0, 2), (1, 2), (1, BEAMS), seconds=0
    )
    latency = [row for row in rows if row["table"] == "latency"]
    all_names = {*measured.RUNTIMES, measured.FUNCTION, measured.MASK, measured.TRANSLATE, *measured.FLOORS}
    for batch in (1, 2):
        for steps, names in ((0, all_names), (2, all_names | {measured.GREEDY})):
            case = {row["contender"]: row for row in latency if (row["batch"], row["steps"]) == (batch, steps)}
            assert set(case) == names
            assert all(row["ms"] > 0 and row["runs"] >= 3 for row in case.values())
            assert case[measured.MASK]["check"] == ("rescored" if steps else "same")
            assert case[measured.ONNX]["check"] == "same" and 0 <= float(case[measured.INT8]["check"]) <= 1
    assert [(row["steps"], row["paths"]) for row in rows if row["table"] == "paths"] == [(0, 1), (2, 1), (2, 2)]
    assert len([row for row in rows if row["table"] == "breakdown"]) == 4

    def answers_agree() -> list[bool]:
        found = bars(rows, (1, BEAMS))
        assert len(found) == 1 + 2 + 4 + 2  # answers; generate, floor and paths
        return [bar["holds"] for bar in found if bar["bar"] == "searches whose answers differ"]

    assert answers_agree() == [True]
    next(row for row in latency if row["contender"] == measured.ONNX)["check"] = "differs"
    assert answers_agree() == [False]
    plot({"rows": rows}, tmp_path / "peers.svg", (1, BEAMS))
    assert measured.FUNCTION in (tmp_path / "peers.svg").read_text()


def test_a_bar_fails_just_beyond_its_limit():
    def row(contender: str, ms: float) -> dict:
        shape = {"batch": 1, "beams": 50, "steps": 0}
        return {"table": "latency", "size": "s", "contender": contender, "ms": ms, "check": "same", **shape}

    def holds(generate: float, onnx: float, floor: float) -> list[bool]:
        times = {measured.FUNCTION: generate, measured.EAGER: 12.0, measured.ONNX: onnx}
        times |= dict.fromkeys(measured.FLOORS, floor)
        return [bar["holds"] for bar in bars([row(*pair) for pair in times.items()], (1, 50))]

    assert holds(generate=100, onnx=10, floor=7.2) == [True, True, True]
    assert holds(generate=99, onnx=10, floor=7.1) == [True, False, False]
