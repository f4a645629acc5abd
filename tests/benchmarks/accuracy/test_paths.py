"""Accuracy and cost by steps and paths: every combination has its row, with the figures of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.accuracy import paths
from tests.builders import tiny_bundle
from tests.training.shops import write_shop
from training.__main__ import main


def test_every_kind_has_accuracy_and_cost(tmp_path: Path, capsys) -> None:
    data, bundle, out = write_shop(tmp_path / "shop"), tiny_bundle(tmp_path / "bundle", 30), tmp_path / "paths.json"
    given = ["--bundle", str(bundle), "--data", str(data)]
    paths.main([*given, "--rounds", "2", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    kinds = [(0, 1), *((steps, count) for steps in (2, 4) for count in (1, 2, 4, 8))]
    assert [(row["steps"], row["paths"]) for row in rows] == kinds
    assert all(row["ms"] > 0 for row in rows) and rows[0]["times_no_steps"] == 1
    capsys.readouterr()
    assert main(["evaluate", *given, "--split", "test", "--steps", "4", "--paths", "8", "--exclude-seen"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert rows[-1]["ndcg@10"] == evaluated["ndcg@10"] and rows[-1]["users"] == evaluated["users"] == 60
    assert len({row["ndcg@10"] for row in rows}) > 1
