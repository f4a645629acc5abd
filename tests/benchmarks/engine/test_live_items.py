"""The benchmark of a catalogue that changes: all parts, small, in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[3]


def test_every_part_is_measured_against_the_quiet_one(tmp_path: Path) -> None:
    out = tmp_path / "live_items.json"
    command = [sys.executable, "-m", "benchmarks.engine.live_items", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    rows = {row["part"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["quiet", "changes", "room"]
    assert all(
        row["searches"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 and row["refused"] == 0 for row in rows.values()
    )
    assert rows["quiet"]["times"] == 1 and rows["quiet"]["changes"] == 0
    assert rows["changes"]["changes"] > 0 and rows["room"]["changes"] > 0 and rows["changes"]["change_p99_ms"] > 0
