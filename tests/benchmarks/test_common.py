"""What benchmarks share: the recorded command makes the same result again, quantiles are values that were measured."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest

from benchmarks.common import Run, argument_parser, record, result_file, spelled_out
from benchmarks.quantiles import quantile


def options_of(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser("benchmarks.engine.example", "An example.")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--rates", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--phase-seconds", type=float, default=8)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--price", type=float)
    parser.add_argument("--out", type=Path, default=Path("out.json"))
    return parser, parser.parse_args(arguments)


def test_the_recorded_command_spells_out_every_option() -> None:
    parser, options = options_of(["--smoke", "--out", "elsewhere.json", "--phase-seconds", "0.5"])
    command = spelled_out(parser.prog, options)
    expected = "--bundle bundles/demo --rates 1,2 --phase-seconds 0.5 --smoke"
    assert command == f"python -m benchmarks.engine.example {expected}"
    _, again = options_of(expected.split())
    assert vars(again) | {"out": options.out} == vars(options)


def test_a_run_records_what_was_true_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.commit", lambda: {"commit": "at start", "dirty": False})
    monkeypatch.setattr("os.getloadavg", lambda: (1.234, 0.0, 0.0))
    run = Run(*options_of([]))
    monkeypatch.setattr("benchmarks.common.commit", lambda: {"commit": "later", "dirty": True})
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    now = time.perf_counter()
    monkeypatch.setattr("time.perf_counter", lambda: now + 90)
    run.record(tmp_path / "result.json", [0], [{"a": 1}], extra="kept")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["commit"], result["dirty"], result["rows"], result["extra"]) == (
        "at start",
        False,
        [{"a": 1}],
        "kept",
    )
    assert result["minutes"] == 1.5 and result["load_average_at_start"] == 1.23
    assert {"machine", "created"} <= result.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_earlier_result_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argument_parser("benchmarks.engine.example", "An example.")
    parser.add_argument("--out", type=result_file)
    result, foreign = tmp_path / "result.json", tmp_path / "package.json"
    for _ in range(2):  # new, then an earlier one
        assert parser.parse_args(["--out", str(result)]).out == result
        record(result, "python -m benchmarks.engine.example", [0], [])
    for text in ('{"rows": []}', "[1]", "no JSON", ""):
        foreign.write_text(text)
        with pytest.raises(SystemExit):
            parser.parse_args(["--out", str(foreign)])
        assert "package.json is not the result of a benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", str(tmp_path)])


def test_quantiles_are_values_by_nearest_rank() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 2, 3, 3]
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([], 0.5) is None
