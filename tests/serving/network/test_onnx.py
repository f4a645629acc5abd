"""ONNX Runtime against eager torch: the same passes and the same answers; int8 is close and needs its gate."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import BundleError
from serving.items.histories import history_items, history_tokens
from serving.network.eager import EagerRuntime
from serving.network.onnx import OnnxRuntime, _run, _session
from serving.network.t5 import KeysValues
from serving.reference import score_all_items
from serving.types import Answer, Request, Rules
from tests.answers import assert_same_answer
from tests.builders import tiny_model
from tests.waiting import DEADLINE

PASSED = {"passed": True}


def runtimes(bundle: Bundle, int8: bool = False) -> tuple[EagerRuntime, OnnxRuntime]:
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    attention = bundle.settings.attention
    return (
        EagerRuntime(bundle.network, tokens, attention),
        OnnxRuntime(bundle.network, tokens, attention, int8=int8),
    )


def random_histories(rng: np.random.Generator, items: int, batch: int) -> list[tuple[int, ...]]:
    """Of no items up to more than the encoder reads."""
    return [tuple(rng.integers(0, items, rng.integers(0, 9)).tolist()) for _ in range(batch)]


def ask(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    return engine.search(list(requests), engine.encode([request.history for request in requests]))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5, rtol=1e-5)


def caches_are_close(ours: list[np.ndarray], theirs: KeysValues) -> None:
    for mine, other in zip(ours, itertools.chain(*theirs), strict=True):
        close(torch.from_numpy(mine), other)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 9),
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    attention=st.sampled_from(["bidirectional", "causal-by-item"]),
    age_bias=st.booleans(),
    item_input=st.booleans(),
)
@torch.inference_mode()
def test_every_pass_equals_eager_torch(seed, batch, rows, attention, age_bias, item_input):
    bundle = tiny_model(30, seed=seed, attention=attention, age_bias=age_bias, item_input=item_input)
    eager, onnx = runtimes(bundle)
    rng, config = np.random.default_rng(seed), bundle.network.t5.config
    torch.manual_seed(seed)
    histories = random_histories(rng, 30, batch)
    (tokens, mask), items = history_tokens(histories, bundle.catalogue.tokens, 6, ()), history_items(histories, 6)
    hidden = eager.encode(tokens, mask, items)
    close(onnx.encode(tokens, mask, items)[mask], hidden[mask])
    expected, cross = eager.cross_keys_values(hidden, mask), onnx.cross_keys_values(hidden, mask)
    close(cross.bias, expected.bias)
    of_heads = [array.reshape(*array.shape[:2], config.num_heads, -1).swapaxes(1, 2) for array in cross.layers]
    caches_are_close(of_heads, expected.layers)
    past, expected_past, written = None, None, 0
    for count in rows:
        written += count
        x = torch.randn(batch, count, config.d_model)
        seen = torch.rand(batch, 1, count, written) < 0.5
        seen[..., written - count :] |= torch.eye(count, dtype=torch.bool)  # a row always sees itself
        bias = torch.randn(batch, config.num_heads, count, written).masked_fill(~seen, float("-inf"))
        theirs, expected_past = eager.step(x, bias, expected, expected_past)
        ours, past = onnx.step(x, bias, cross, past)
        close(ours, theirs)
        close(onnx.logits(ours), eager.logits(theirs))
        caches_are_close(past, expected_past)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 60),
    steps=st.integers(0, 3),
    form=st.sampled_from(["token", "state", "both"]),
    batch=st.integers(1, 9),
    paths=st.integers(1, 3),
    dense=st.sampled_from([0.0, 0.7]),
    beam=st.sampled_from([5, 64]),
    age_bias=st.booleans(),
    item_input=st.booleans(),
)
def test_answers_equal_eager_torch(seed, items, steps, form, batch, paths, dense, beam, age_bias, item_input):
    options = {"step_form": form, "dense_weight": dense, "paths": paths, "age_bias": age_bias, "item_input": item_input}
    bundle = tiny_model(items, seed=seed, suffix_tokens=(1,), **options)
    rng = np.random.default_rng(seed)
    requests = [
        Request(history, 5, beam, steps, Rules(exclude=history[:3])) for history in random_histories(rng, items, batch)
    ]
    expected = ask(Engine(bundle), requests)
    for ours, theirs in zip(ask(Engine(bundle, runtime="onnx"), requests), expected, strict=True):
        assert_same_answer(ours, theirs)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 30), batch=st.integers(1, 3))
@torch.no_grad()
def test_a_wide_beam_scores_every_item_as_brute_force_does(seed, items, batch):
    bundle = tiny_model(items, seed=seed)
    histories = random_histories(np.random.default_rng(seed), items, batch)
    answers = ask(Engine(bundle, runtime="onnx"), [Request(history, items, 64, 0) for history in histories])
    for history, answer in zip(histories, answers, strict=True):
        expected, _ = score_all_items(bundle, history, ())
        assert sorted(answer.items) == list(range(items))
        np.testing.assert_allclose(answer.scores, expected[answer.items], atol=1e-4)
        np.testing.assert_allclose(answer.scores, np.sort(expected)[::-1], atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_an_answer_does_not_depend_on_the_rest_of_its_batch(runtime):
    engine = Engine(tiny_model(seed=9, int8=PASSED), runtime=runtime)
    requests = [Request(tuple(range(i, i + 1 + i % 5)), 10, 20, 3, Rules(exclude=(i,))) for i in range(9)]
    for request, answer in zip(requests, ask(engine, requests), strict=True):
        (alone,) = ask(engine, [request])
        assert_same_answer(alone, answer)


@torch.inference_mode()
def test_int8_is_close_to_float32_and_not_the_same():
    bundle = tiny_model(seed=4, width=64, age_bias=True)
    eager, onnx = runtimes(bundle, int8=True)
    tokens, mask = history_tokens([(1, 2, 3), (4,)], bundle.catalogue.tokens, 6, ())
    hidden = eager.encode(tokens, mask)
    close(onnx.encode(tokens, mask)[mask], hidden[mask])  # cached states must not depend on the runtime
    torch.manual_seed(0)
    x, bias = torch.randn(2, 5, 64), torch.randn(2, 2, 5, 5)
    expected, _ = eager.step(x, bias, eager.cross_keys_values(hidden, mask), None)
    found, _ = onnx.step(x, bias, onnx.cross_keys_values(hidden, mask), None)
    error = (found - expected).std() / expected.std()
    assert 1e-4 < error < 0.05


@torch.inference_mode()
def test_a_row_of_zeros_stays_zero_in_int8():
    bundle = tiny_model()
    eager, onnx = runtimes(bundle, int8=True)
    hidden, mask = torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool)
    x, bias = torch.zeros(1, 3, 16), torch.zeros(1, 2, 3, 3)
    for runtime in (eager, onnx):
        after, _ = runtime.step(x, bias, runtime.cross_keys_values(hidden, mask), None)
        assert not after.any() and not runtime.logits(after).any()


@pytest.mark.parametrize("name", ["", "ONNX", "onnx-int4"])
def test_an_unknown_runtime_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="eager, onnx, onnx-int8"):
        Engine(tiny_model(), runtime=name)


@pytest.mark.parametrize("gate", [None, {}, {"passed": False}, {"users": 10}])
def test_int8_is_refused_without_a_passed_gate(gate):
    with pytest.raises(BundleError, match="runtime onnx"):
        Engine(tiny_model(int8=gate), runtime="onnx-int8")
    Engine(tiny_model(int8=gate), runtime="onnx")  # only int8 needs the gate


def test_threads_are_as_configured_and_do_not_spin():
    bundle = tiny_model()
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    options = OnnxRuntime(bundle.network, tokens, "bidirectional", threads=2)._step.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_subnormals_are_flushed_to_zero_during_a_run_only():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    small = np.full(1, 1e-20, dtype=np.float32)
    assert _run(_session(model.SerializeToString(), 1), {"x": small})[0] == 0
    assert (torch.from_numpy(small) ** 2).item() > 0


def test_importing_onnx_runtime_sends_and_stores_nothing(tmp_path: Path) -> None:
    quiet = {name: value for name, value in os.environ.items() if name != "CI"}  # CI turns telemetry off by itself
    subprocess.run(
        [sys.executable, "-c", "import serving.network.onnx"],
        env=quiet | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        check=True,
        timeout=DEADLINE,
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
