"""The gate for int8: its measures by hand, what it writes down, and that weights which are too coarse do not pass."""

from __future__ import annotations

import numpy as np
import pytest

from serving.network import onnx_graph
from tests.training.small import small_config, small_workspace
from training.int8_gate import LEAST_NDCG, LEAST_OVERLAP, int8_gate, overlap, passes


def test_overlap_by_hand():
    reference = np.array([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert overlap(reference[:, ::-1], reference) == 1.0  # order does not count
    assert overlap(np.array([[1, 2, 7, 8], [6, 9, -1, -1]]), reference) == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert overlap(np.full_like(reference, -1), reference) == 0.0


@pytest.mark.parametrize(
    ("share", "int8", "good"),
    [
        (LEAST_OVERLAP, 0.5 * LEAST_NDCG, True),
        (LEAST_OVERLAP - 0.001, 0.5, False),
        (1.0, 0.5 * LEAST_NDCG - 0.001, False),
    ],
)
def test_both_overlap_and_ndcg_have_to_hold(share, int8, good):
    assert passes({"steps": 0, "overlap@10": share, "ndcg@10": {"fp32": 0.5, "int8": int8}}) is good


def test_it_measures_the_default_and_every_evaluated_number_of_steps():
    work = small_workspace(small_config("evaluation.steps=[0,2]"))
    gate = int8_gate(work)
    assert gate["users"] == 60 and gate["beam"] == 12
    assert gate["least"] == {"overlap@10": LEAST_OVERLAP, "ndcg@10": LEAST_NDCG}
    assert [row["steps"] for row in gate["measured"]] == [0, 2]
    assert gate["passed"] == all(passes(row) for row in gate["measured"])
    assert all(0.8 < row["overlap@10"] <= 1 for row in gate["measured"])


def test_weights_of_two_bits_do_not_pass(monkeypatch):
    monkeypatch.setattr(onnx_graph, "INT8_WEIGHT", 1)
    gate = int8_gate(small_workspace(small_config("evaluation.steps=[0]")))
    assert not gate["passed"] and gate["measured"][0]["overlap@10"] < 0.9
