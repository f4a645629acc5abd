"""The constraint's benchmark on a small catalogue: contenders agree before timing, and every part has its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.engine.constraint import plot
from benchmarks.engine.constraint_contenders import BinarySearch, DictTrie, HashSet, Ours, clustered_codes, path_numbers
from benchmarks.engine.constraint_walk import Walk, agree, samples
from serving.items.rules import RuleBook
from serving.types import Rules
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[3]


def test_codes_are_distinct_and_clustered() -> None:
    codes = clustered_codes(5000, seed=0)
    assert codes.shape == (5000, 4) and codes.min() >= 0 and codes.max() <= 255
    assert len(np.unique(path_numbers(codes))) == 5000
    common = np.sort(np.bincount(codes[:, 0]))[::-1]
    assert common[:25].sum() > 2 * common.sum() * 25 / 256
    assert (clustered_codes(5000, seed=0) == codes).all()


def test_a_contender_that_finds_other_items_is_not_timed() -> None:
    codes = clustered_codes(3000, seed=0)
    ours = Ours(codes)
    walks = [Walk(contender) for contender in (ours, BinarySearch(codes), HashSet(codes), DictTrie(codes))]
    agree(walks, samples(2))
    found = int(walks[1].run(samples(1)[0])[1][0, 0])
    with RuleBook(ours.trie).blocked([Rules(deny=(path_numbers(codes).tolist().index(found),))]) as ours.blocked:
        with pytest.raises(SystemExit, match="binary search finds other items"):
            agree(walks[:2], samples(1))


def test_every_part_has_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "constraint.json"
    command = "-m benchmarks.engine.constraint --items 1.2e4,3e4 --rounds 2 --limit-gib 1".split()
    subprocess.run([sys.executable, *command, "--out", str(out)], cwd=ROOT, check=True, timeout=DEADLINE)
    result = json.loads(out.read_text())
    assert result["command"] == "python -m benchmarks.engine.constraint --items 12000,30000 --rounds 2 --limit-gib 1"
    rows = result["rows"]
    by_part = {
        part: [row for row in rows if row["part"] == part] for part in ("step", "flat", "rules", "build", "memory")
    }
    assert {(row["items"], row["rows"]) for row in by_part["step"]} == {
        (n, q) for n in (12_000, 30_000) for q in (50, 400)
    }
    (mask, *_) = (row for row in by_part["step"] if row["contender"] == "dense mask")
    assert mask["note"] == "not run: 4 GiB" and "step_us" not in mask
    for row in by_part["build"]:
        counted = 2 * (row["nodes"] + row["parents"] + row["items"])  # the formula that `memory` extrapolates with
        assert row["arrays_mib"] == pytest.approx(4 * counted / 2**20, abs=0.1)
        assert row["open_private_mib"] < row["arrays_mib"] + 8
    assert all(by_part.values()) and {row["basis"][:7] for row in by_part["memory"]} == {"measure", "formula"}
    plot(result, tmp_path / "constraint.svg")
    assert "binary search" in (tmp_path / "constraint.svg").read_text()
