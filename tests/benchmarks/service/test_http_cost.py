"""The figures of HTTP's cost follow from the turns, and the engine's process answers a line with a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.service.http_cost import HISTORY, Turns, engine, histories_of_ids, name, summarise, write_random
from tests.builders import tiny_bundle, tiny_model


def test_shares_are_medians_over_the_turns_of_all_processes() -> None:
    first = Turns([(100, 0.010, 90, 0.011), (50, 0.020, 30, 0.040)], log_lines=1.0)
    row = summarise([first, Turns([(200, 0.005, 160, 0.0062)], log_lines=1.0)], at_least=0.85)
    assert row["log_lines"] == 1
    assert (row["engine_per_s"], row["http_per_s"], row["share"]) == (100, 90, 0.8)
    assert (row["engine_cpu_ms"], row["http_cpu_ms"], row["cpu_share"]) == (10, 11, 0.806)
    assert (row["share_lowest"], row["share_highest"]) == (0.6, 0.9)
    assert row["holds"] is False


@pytest.mark.parametrize(("http", "holds"), [(80, True), (79, False)])
def test_the_bar_is_the_throughput_that_is_kept(http: float, holds: bool) -> None:
    repeats = [Turns([(100, 1.0, http, 1.0)], log_lines=1.0)]
    assert summarise(repeats, at_least=0.8)["holds"] is holds
    assert "holds" not in summarise(repeats, at_least=None)


def test_the_larger_model_can_be_served(tmp_path: Path) -> None:
    assert name(write_random(tiny_model(), tmp_path / "written")).startswith("tiny, ")


def test_the_engine_alone_measures_the_steps_of_each_line(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    assert all(len(ids) == len(set(ids)) == HISTORY for ids in histories_of_ids(bundle))
    with engine(bundle, "eager", 0.05, {0}) as alone:
        assert alone.stdin and alone.stdout
        for steps in (0, 4):
            alone.stdin.write(f"{steps}\n")
            alone.stdin.flush()
            per_second, cpu = map(float, alone.stdout.readline().split())
            assert per_second > 0 and 0 < cpu < 10
