"""The benchmark of the deployed answer: a small catalogue with an index, and all answers in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[3]


def test_every_answer_is_measured_against_the_search_alone(tmp_path: Path) -> None:
    out = tmp_path / "deployed.json"
    command = [sys.executable, "-m", "benchmarks.engine.deployed", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["items"], row["batch"], row["answer"]) for row in rows] == [
        (4000, batch, answer) for batch in (1, 8) for answer in ("search", "memory", "dense", "both")
    ]
    assert all(row["times"] == 1 for row in rows if row["answer"] == "search")
    assert all(1000 < row["touched"] <= 20 * 200 and row["ms"] > 0 for row in rows)
    assert all(0.5 < row["recall"] <= 1 for row in rows)
