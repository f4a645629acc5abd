"""The accuracy table on a tiny shop: every variant and stage has its rows, and a second call trains nothing again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import DEADLINE
from training.data.shop import write_shop

ROOT = Path(__file__).parents[3]
SMALL = """
    tokenizer.kind=random tokenizer.source=collaborative tokenizer.rqvae.codes=8
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 model.max_steps=2
    pretrain.steps=3 sft.steps=3 rl.steps=2 rl.batch_size=8 evaluation.steps=[0,2] evaluation.valid_users=20
    evaluation.choice_users=20 evaluation.beam=10 evaluation.dense_weights=[0.0,0.5]
""".split()


def ask(folder: Path, *more: str, question: str = "stages") -> dict:
    command = [sys.executable, "-m", "benchmarks.accuracy", question, "--data", str(folder / "shop")]
    command += ["--work", str(folder / "work"), "--out", str(folder / "result.json"), "--set", *SMALL, *more]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE)
    return json.loads((folder / "result.json").read_text())


def test_every_stage_and_control_has_its_rows(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    result = ask(tmp_path)
    named = [(row["model"], row["steps"], row["excluded"]) for row in result["rows"]]
    stages = [
        (f"slow: {stage}", steps, seen)
        for stage in ("pretrain", "sft", "rl")
        for steps in (0, 2)
        for seen in (False, True)
    ]
    assert named[: len(stages)] == stages
    assert {name for name, *_ in named[len(stages) :]} == {"slow: deployed", "plain"}
    assert ("plain", 0, True) in named and ("plain", 2, True) not in named
    assert {"command", "commit", "machine", "seeds", "minutes", "protocol"} <= result.keys()

    before = (tmp_path / "work/slow/rl.latest.safetensors").stat().st_mtime_ns
    assert ask(tmp_path)["rows"] == result["rows"]
    assert (tmp_path / "work/slow/rl.latest.safetensors").stat().st_mtime_ns == before


def test_a_converged_model_is_measured_alone_and_joined_by_each_rule_and_has_its_curve(tmp_path):
    write_shop(tmp_path / "shop", users=40, items=60, seed=0)
    more = ("pretrain.steps=4", "sft.steps=0", "rl.steps=0", "pretrain.eval_every=2", "pretrain.state_weight=1")
    result = ask(tmp_path, *more, "neighbours.enabled=true", question="converged")
    models = ["plain", "state alone", "plain, dense score joined", "memory alone", "plain, and memory",
              "plain, and memory, 50 candidates"]  # fmt: skip
    rows = {(row["model"], row["excluded"]): row for row in result["rows"]}
    assert list(rows) == [(model, excluded) for excluded in (False, True) for model in models]
    for (model, excluded), row in rows.items():
        assert 0 <= row["ndcg@10"] <= row["recall@10"] <= 1
        if model != "memory alone":
            alone = rows["memory alone", excluded]["ndcg@10"]
            assert row["gain"] == pytest.approx(row["ndcg@10"] - alone, abs=2e-5) and row["low"] <= row["gain"]
    assert [row["step"] for row in result["validation"]] == [0, 2, 4]
    once, twice = (row["epochs"] for row in result["validation"][1:])
    assert 0 < once and twice == pytest.approx(2 * once, abs=0.1)
