"""A bundle's own sample: recorded at export, kept in it, asked again before the bundle serves beside another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving import sample
from serving.bundle import SAMPLE, Bundle
from serving.engine import Engine
from serving.errors import BundleError
from serving.types import Request, SampleAnswer
from tests.builders import on_disk, tiny_model

HISTORIES = [[row, row + 1, row + 2, *range(20, 30)] for row in range(5)]


def test_a_model_finds_what_it_found_and_another_does_not(tmp_path: Path) -> None:
    made = tiny_model(neighbours=True)
    made.sample = sample.record_sample(Engine(made), HISTORIES)
    opened = Bundle.load(on_disk(tmp_path / "b", made))
    assert opened.sample == made.sample and len(opened.sample) == 2 * len(HISTORIES)
    assert {each.steps for each in opened.sample} == {0, 4}
    engine = Engine(opened)
    newest = tuple(HISTORIES[0][-6:])  # the model reads six items
    assert opened.sample[0].history == [f"i{row}" for row in newest]
    [answer] = engine.search([Request(newest, 10, 50, 0)], engine.encode([newest]))
    assert opened.sample[0].items == [f"i{row}" for row in answer.items]
    assert sample.check_sample(engine) == 1.0
    other = tiny_model(seed=9)
    other.sample = made.sample
    with pytest.raises(BundleError, match="does worse than when it was exported: .* finds [0-9]+% again"):
        sample.check_sample(Engine(other))


def test_the_share_is_that_of_the_recorded_items(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_model()
    made.sample = sample.record_sample(Engine(made), HISTORIES[:1])
    first = made.sample[0]
    absent = [f"i{row}" for row in range(60) if f"i{row}" not in first.items]
    made.sample = [SampleAnswer(first.history, 0, [*first.items[:7], *absent[:3]])]
    with pytest.raises(BundleError, match="70% again, and 90%"):
        sample.check_sample(Engine(made))
    monkeypatch.setattr(sample, "LEAST_OVERLAP", 0.7)
    assert sample.check_sample(Engine(made)) == pytest.approx(0.7)


def test_bundles_without_a_sample_are_not_asked_and_foreign_items_are_refused() -> None:
    assert sample.check_sample(Engine(tiny_model())) is None
    made = tiny_model()
    made.sample = [SampleAnswer(["i1", "nowhere"], 0, ["i2"])]
    with pytest.raises(BundleError, match="does not have"):
        sample.check_sample(Engine(made))


def test_a_sample_names_nobody(tmp_path: Path) -> None:
    made = tiny_model()
    made.sample = sample.record_sample(Engine(made), HISTORIES * 10)
    written = json.loads((on_disk(tmp_path / "b", made) / SAMPLE).read_text())
    assert len(written) == 2 * sample.SIZE and {tuple(each) for each in written} == {("history", "steps", "items")}
