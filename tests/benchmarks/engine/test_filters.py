"""The benchmark of filters: every kind, small, in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[3]


def test_new_filters_are_measured_beside_those_seen_before(tmp_path: Path) -> None:
    out = tmp_path / "filters.json"
    command = [sys.executable, "-m", "benchmarks.engine.filters", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    rows = {row["filter"]: row for row in json.loads(out.read_text())["rows"]}
    none, unused = rows.pop("none"), rows.pop("unused memory")
    assert none["seen_ms"] > 0 and unused["new_ms"] > 0 and len(rows) == 11
    assert 0.15 < rows["a fifth, by price"]["share"] < 0.25 < 0.75 < rows["four fifths, by price"]["share"] < 0.85
    assert all(row["new_ms"] > row["seen_ms"] > 0 and row["read_ms"] > 0 for row in rows.values())
    rows.pop("boost, a fifth")
    assert all(row["first_ms"] > 0 and row["changed_ms"] > 0 for row in rows.values())
    assert rows["8 times"]["index_ms"] > 0
