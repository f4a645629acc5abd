"""Ways to run the decoder on a tiny model: what they compute, and what is said of those that cannot run."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.engine import steps as measured
from benchmarks.engine.contenders import make_case, make_model
from benchmarks.engine.sizes import clustered_codes
from serving.items.vocabulary import Vocabulary
from serving.network.t5 import ModelConfig

VOCABULARY = Vocabulary(max_steps=2, codebook_sizes=(12, 12, 12), reasoning_codes=7)
CONFIG = ModelConfig(VOCABULARY.size, 16, 8, 32, num_layers=2, num_decoder_layers=2, num_heads=2)


def test_every_contender_runs_the_same_calls_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows = measured.measure(CONFIG, VOCABULARY, 300, ((1, 6), (2, 6)), (0, 2), seconds=0)
    missing = {row["contender"]: row["missing"] for row in rows if "missing" in row}
    assert missing == {"OpenVINO": "openvino is not installed", "Inductor": "there is no C++ compiler"}
    ran = [row for row in rows if "missing" not in row]
    assert all(row["ms"] > 0 and row["times_floor"] >= 1 for row in ran if row["contender"] in measured.FLOORS)
    for batch in (1, 2):
        for steps in (0, 2):
            case = [row for row in ran if (row["batch"], row["steps"]) == (batch, steps)]
            apart = {row["contender"]: row["difference"] for row in case if row["part"] == "decoder"}
            assert set(apart) == {"eager", "ONNX", "int8", *measured.FLOORS}
            assert apart["eager"] == 0 <= apart["ONNX"] < 1e-4 < apart["int8"] < 0.5
            searched = {row["contender"] for row in case if row["part"] == "search"}
            assert searched == {"ours, eager", "ours, ONNX", "ours, int8", *measured.FLOORS}


@torch.no_grad()
def test_a_search_calls_the_decoder_once_per_position() -> None:
    codes = clustered_codes(300, 3, 12, seed=1)
    model = make_model(CONFIG, VOCABULARY, codes, seed=2)
    case = make_case(model, 2, 3, 6, seed=3)
    calls, outputs = measured.record(model, case)
    assert [call.x.shape[1] for call in calls] == [1, 1, 1, 6, 6]  # start, two steps, all item tokens but the last
    assert [output.shape for output in outputs] == [call.x.shape for call in calls]
    passes = measured.products_of_block_search(model, case)
    assert len([one for one in passes if one.kind == "step"]) == len(calls)
    assert [one.products[0].n for one in passes if one.kind == "output"] == [7, 7, 12, 12, 12]
