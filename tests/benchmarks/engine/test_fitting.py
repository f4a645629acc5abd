"""The benchmark of fitting: its parts are those of a run, each resumes the one before, and growth is by size."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine import fitting
from serving.bundle import Bundle
from tests.training.shops import QUICK
from training.config_file import load_config
from training.data.read import read_data


def test_the_parts_make_a_bundle(tmp_path: Path) -> None:
    data, bundle = tmp_path / "shop", tmp_path / "bundle"
    events = fitting.write_data(data, 80, 60)
    few = (f"{stage}.{name}=2" for stage in ("pretrain", "sft", "rl") for name in ("steps", "eval_every", "warmup"))
    config = load_config(None, [*fitting.SETTINGS, *QUICK, *few, "tokenizer.kind=random"])
    found = [fitting._part(part, data, bundle, config) for part in (*fitting.PARTS, "memory")]
    assert all(seconds > 0 and peak > 0.1 for seconds, peak in found)
    assert len(read_data(data).sequence) == events > 80 * 5
    assert len(Bundle.load(bundle).catalogue) == 60


def test_growth_is_one_where_the_time_grows_as_n_log_n() -> None:
    def rows(items: int, *seconds: float) -> list[fitting.Row]:
        return [
            {"items": items, "part": part, "seconds": s} for part, s in zip(("ids", "memory"), seconds, strict=True)
        ]

    small = fitting.with_growth(rows(1000, 3.0, 3.0), [])
    assert not any("growth" in row for row in small)
    large = fitting.with_growth(rows(10_000, 40.0, 300.0), small)  # n log n: 10,000 * 4 against 1,000 * 3
    assert [row["growth"] for row in large] == [1.0, 7.5]
