"""The comparison of memories without a network: every kind has its rows, and gains are differences of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import memories
from training import memory_choice
from training.linear import LINEAR_GRID
from training.neighbours import GRID, JOINED_GRID

USERS, ITEMS = 60, 30


def write_walks(folder: Path) -> Path:
    """Every user walks round a circle, seven further at each step, with a slip now and then."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        item = rng.integers(ITEMS)
        for step in range(7):
            lines.append(f"u{user},i{item},{step}")
            item = rng.integers(ITEMS) if rng.random() < 0.15 else (item + 7) % ITEMS
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_every_kind_has_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for grid in (GRID, JOINED_GRID, LINEAR_GRID):
        for name, values in grid.items():
            monkeypatch.setitem(grid, name, values[1:3])
    monkeypatch.setattr(memory_choice, "SHARES", (0.0, 0.5, 1.0))
    out = tmp_path / "memory.json"
    memories.main(["--data", str(write_walks(tmp_path / "walks")), "--out", str(out)])
    result = json.loads(out.read_text())
    names = ["neighbours", "counted", "linear", "both", "both", "both"]
    assert [(row["model"], row["excluded"]) for row in result["rows"]] == [
        (name, excluded) for excluded in (False, True) for name in names
    ]
    means = {(row["model"], row["excluded"]): row["ndcg@10"] for row in result["rows"]}
    for row in result["rows"]:
        if "against" in row:
            assert row["gain"] == pytest.approx(row["ndcg@10"] - means[row["against"], row["excluded"]], abs=2e-5)
            assert row["low"] <= row["gain"] <= row["high"]
    assert min(means.values()) > 0.3 and means["linear", True] != means["linear", False]
    chosen = [(row["model"], row["excluded"]) for row in result["validation"]]
    assert chosen == [(name, excluded) for excluded in (False, True) for name in names[:4]]
    assert all(("valid_ndcg@10_cross_fitted" in row) == (row["model"] != "neighbours") for row in result["validation"])
    assert "| both " in capsys.readouterr().out
