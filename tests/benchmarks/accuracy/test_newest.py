"""What learning from the newest events gains: the rows of the table, and with whom each is compared."""

from __future__ import annotations

import json

import pytest

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.compare_newest import MEMORY, MIXED, PLAIN
from tests.benchmarks.accuracy.test_look_back import SMALL
from training.data.shop import write_shop


def test_each_model_is_compared_with_itself_before_and_the_mixture_with_the_memory_of_its_time(tmp_path):
    write_shop(tmp_path / "shop", users=60, items=40, seed=0)
    out = tmp_path / "result.json"
    arguments = ["newest", "--data", str(tmp_path / "shop"), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert main([*arguments, "--set", *SMALL, "neighbours.parts=counted", "evaluation.choice_users=20"]) == 0
    result = json.loads(out.read_text())
    for excluded in (False, True):
        rows = [row for row in result["rows"] if row["excluded"] == excluded]
        value = {(row["model"], row["newest"]): row["ndcg@10"] for row in rows if row["split"] == "test"}
        assert value.keys() == {(name, newest) for name in (MEMORY, PLAIN, MIXED) for newest in (False, True)}
        for row in rows:
            if row["split"] == "test" and "against" in row:
                memory = row["against"] != row["model"]
                base = value[MEMORY, row["newest"]] if memory else value[row["model"], False]
                assert row["gain"] == pytest.approx(row["ndcg@10"] - base, abs=2e-5)
        (trial,) = [row for row in rows if row["split"] == "valid"]
        (check,) = [check for check in result["checks"] if check["excluded"] == excluded]
        assert (trial["users"], trial["gain"]) == (check["users"], check["gain"]) and trial["users"] == 20
        assert trial["gain"] == pytest.approx(check["ndcg@10"] - check["ndcg@10_before"], abs=2e-5)
