"""The benchmark of the start: a bundle as it is measured can be served, and every part of its opening has a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine import start
from benchmarks.engine.sizes import VOCABULARY
from serving.bundle import Bundle
from serving.network.t5 import ModelConfig


def test_every_part_of_the_start_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelConfig(VOCABULARY.size, 16, 8, 32, num_layers=1, num_decoder_layers=1, num_heads=2)
    monkeypatch.setitem(start.SIZES, "5M", tiny)
    path = tmp_path / "bundle"
    start.write(path, 3000)
    bundle = Bundle.load(path)
    assert bundle.neighbours is not None and len(bundle.neighbours.items) == 3000 * start.NEIGHBOURS
    found = start.parts(path)
    assert set(found) == {*start.PARTS, "title_ms"} and found["load_s"] >= found["catalogue_s"] >= 0
    assert bundle.catalogue.find_titles("red shoe", 2000) and bundle.catalogue.find_titles("guitar 1234", 1) == [1234]
