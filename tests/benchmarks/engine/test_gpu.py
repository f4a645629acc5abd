"""The GPU's benchmark on tiny models and the CPU: all parts run, techniques do what they say, and the limit is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import gpu, gpu_ladder
from benchmarks.engine.answers import Paths, overlap
from benchmarks.engine.gpu import FULL, SMOKE, Cell, aims, cells, different, work_through
from benchmarks.engine.gpu_cells import Subject
from benchmarks.engine.gpu_ladder import ANCESTORS, BFLOAT16, EXPANDED, ONE_GRAPH, ONE_ROW, SHARED, Case, rungs
from tests.meta import OffTheDevice, captured_once

CPU = torch.device("cpu")
RUNGS = [EXPANDED, SHARED, ANCESTORS, ONE_ROW, ONE_GRAPH, BFLOAT16]
BATCH, STEPS, BEAMS, LEVELS = 3, 2, 6, 3


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(SMOKE, CPU, "tiny")


@pytest.fixture
def case(subject: Subject) -> Case:
    return Case(subject.hidden[:BATCH], subject.mask[:BATCH], STEPS, BEAMS)


def test_every_part_has_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows: dict[str, list[dict[str, Any]]] = {
        part: [row for row in result["rows"] if row["part"] == part] for part in gpu.COLUMNS
    }
    assert result["left_out"] == [] and result["failed"] == {}
    assert len(rows["parity"]) == 2 * 5
    assert {(row["eager"], row["graph"]) for row in rows["parity"]} == {("same", "same")}
    assert len({(row["steps"], row["batch"], row["beams"]) for row in rows["latency"]}) == 2 * 2 * 2
    assert [row["rung"] for row in rows["ladder"]] == 2 * RUNGS
    assert all(row["check"] == "same" or row["rung"] == BFLOAT16 for row in rows["ladder"])
    assert all(row["ms"] > 0 and row["searches_per_s"] > 0 for row in rows["latency"] + rows["ladder"])
    assert {(row["rows"], row["rules"]) for row in rows["constraint"]} == {
        (count, rules) for count in (6, 48) for rules in ("", "subset and deny")
    }
    assert len(rows["aims"]) == 6 and all("value" in row for row in rows["aims"])
    assert "answers that differ" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here: run this where there is one"):
        gpu.main([])


def test_rungs_differ_in_rows_and_copies_alone(subject: Subject, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    memories, rows = [], []
    decode, step = gpu_ladder.decode, subject.there.runtime.step

    def seen_decode(t5: Any, x: torch.Tensor, bias: Any, memory: Any, past: Any) -> Any:
        memories.append(len(memory.layers[0][0]))
        rows.append(x.shape[:2])
        return decode(t5, x, bias, memory, past)

    def seen_step(x: torch.Tensor, *rest: Any) -> Any:
        rows.append(x.shape[:2])
        return step(x, *rest)

    monkeypatch.setattr(gpu_ladder, "decode", seen_decode)
    monkeypatch.setattr(subject.there.runtime, "step", seen_step)
    reasoning, positions = 1 + STEPS, STEPS + LEVELS
    with torch.inference_mode():
        for name, expected in (
            (EXPANDED, [(BATCH * BEAMS, 1)] * positions),
            (SHARED, [(BATCH * BEAMS, 1)] * positions),
            (ANCESTORS, [(BATCH, BEAMS)] * positions),
            (ONE_ROW, [(BATCH, 1)] * reasoning + [(BATCH, BEAMS)] * (positions - reasoning)),
        ):
            rows.clear()
            subject.rungs[name](case)
            assert rows == expected, name
    assert memories == [BATCH * BEAMS] * positions + [BATCH] * positions


@torch.inference_mode()
def test_bfloat16_rounds_the_network_and_not_the_sums(subject: Subject, case: Case) -> None:
    half = gpu_ladder.Bfloat16Runtime(subject.there.runtime)
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.bfloat16}
    exact, rounded = (subject.rungs[name](case) for name in (ONE_ROW, BFLOAT16))
    assert rounded.scores.dtype == torch.float32
    assert 1e-4 < (rounded.scores - exact.scores).abs().max() < 0.2
    assert overlap(rounded, exact, BEAMS) > 0.7


@torch.inference_mode()
def test_every_rung_lives_on_the_device(subject: Subject) -> None:
    """Without values on the host, and without the host's values: what is captured can be, and nothing waits."""
    there = subject.there.to(torch.device("meta"))
    hidden, mask = subject.hidden.to("meta"), subject.mask.to("meta")
    for name, rung in rungs(there, captured_once).items():
        with OffTheDevice() as seen:
            found = rung(Case(hidden, mask, STEPS, BEAMS))
        assert seen.found == [] and found.scores.shape == (len(hidden), BEAMS), name


@torch.inference_mode()
def test_a_rung_that_finds_anything_else_is_not_timed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = subject.rungs[SHARED]

    def wrong(case: Case) -> Paths:
        found = right(case)
        return Paths(found.tokens.flip(1), found.scores)

    monkeypatch.setitem(subject.rungs, SHARED, wrong)
    rows = subject.ladder(STEPS, 1, BEAMS)
    assert [row["rung"] for row in rows if "ms" not in row] == [SHARED]
    assert different(rows) == 1
    (last,) = aims(SMOKE, [{"part": "ladder", **row} for row in rows])[-1:]
    assert last["aim"] == "answers that differ" and last["holds"] is False


def test_work_ends_in_time_and_what_fails_costs_no_other() -> None:
    now = 0.0

    def cell(part: str, name: str, seconds: float, broken: bool = False) -> Cell:
        def run() -> list[dict[str, Any]]:
            nonlocal now
            now += seconds
            if broken:
                raise RuntimeError("out of memory")
            return [{"name": name}]

        return Cell(part, name, run)

    work = [
        cell("latency", "first", 10),
        cell("latency", "broken", 40, broken=True),
        cell("latency", "now thought to need 40", 5),
        cell("ladder", "thought to need 30", 1),
        cell("ladder", "now thought to need 1", 1),
    ]
    rows, left_out, failed = work_through(work, seconds=80, clock=lambda: now)
    assert [row["name"] for row in rows] == ["first", "thought to need 30", "now thought to need 1"]
    assert left_out == ["latency: now thought to need 40"]
    assert failed == {"latency: broken": "RuntimeError: out of memory"}
    assert now <= 80


def test_what_matters_most_comes_first() -> None:
    names = [f"{cell.part}: {cell.name}" for cell in cells(FULL, CPU)]
    assert len(names) == len(set(names)) == 8 + 96 + 4 + 1
    assert names[8] == "latency: 5M, 4 steps 1x50"
    assert [name.split(":")[0] for name in names[8:21]] == ["latency"] * 8 + ["ladder"] * 4 + ["constraint"]


def test_an_aim_that_was_left_out_has_no_value() -> None:
    found = aims(FULL, [])
    assert [row["limit"] for row in found] == ["<= 2", ">= 8000", "<= 2", ">= 8000", "<= 0.05", "<= 0"]
    assert [("value" in row) for row in found] == [False] * 5 + [True]
    fast = {"part": "latency", "size": "5M", "steps": 4, "batch": 1, "beams": 50, "ms": 2.0, "searches_per_s": 7999}
    found = aims(FULL, [fast, fast | {"steps": 2, "ms": 1.0, "searches_per_s": 9000}])
    assert [row.get("holds") for row in found] == [True, False, None, None, None, True]
