"""Plots are drawn from recorded results alone, and the same result gives the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plots import main


@pytest.mark.parametrize("name", ["constraint", "peers", "soak", "steps-scientific2018", "deployed-scientific2018"])
def test_the_same_result_gives_the_same_file(name: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        assert main([name, "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "there is no benchmarks/results/nothing.json"), ("latency", "latency has a table, but no plot")],
)
def test_it_says_what_cannot_be_drawn(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name])
    assert message in capsys.readouterr().err
