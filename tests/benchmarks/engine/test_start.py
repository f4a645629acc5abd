"""The benchmark of the start: a small bundle, all parts and a service of two workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.engine.start import COLUMNS
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[3]


def test_every_part_of_a_start_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    command = [sys.executable, "-m", "benchmarks.engine.start", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    [row] = json.loads(out.read_text())["rows"]
    assert row.keys() == set(COLUMNS) and row["items"] == 2000
    assert row["ready_s"] > row["load_s"] > 0
    assert 0.05 < row["worker_gib"] < 2 and row["shared_gib"] > 0.01
