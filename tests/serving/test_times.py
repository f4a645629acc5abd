"""A network that reads when events were: every runtime has the scores of the reference, whatever was cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.engine import Engine
from serving.reference import score_all_items
from serving.types import EventData, Request
from tests.builders import GATE, tiny_model

HISTORY = (4, 9, 2, 30, 7, 11)
TIMES = np.array([1e9, 1e9 + 30, np.nan, 1e9 + 4000, 1e9 + 3900, 1e9 + 90_000])


def events(times: np.ndarray) -> EventData:
    return EventData(np.ones(len(times), np.float32), times)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"age_bias": True, "attention": "causal-by-item"}, {"suffix_tokens": (1,), "gate": GATE, "neighbours": True}],
)
def test_scores_are_those_of_the_reference_for_one_state(runtime: Any, settings: dict[str, Any]) -> None:
    bundle = tiny_model(40, time_bias=True, **settings)
    engine = Engine(bundle, runtime=runtime)
    states = engine.encode([HISTORY, HISTORY[:2], HISTORY, HISTORY])  # a state does not depend on times
    told = [events(TIMES), events(TIMES[:2]), None, events(np.full(6, 5.0))]
    histories = [HISTORY, HISTORY[:2], HISTORY, HISTORY]
    requests = [Request(history, 40, 40, 0, events=each) for history, each in zip(histories, told, strict=True)]
    found = [dict(zip(answer.items, answer.scores, strict=True)) for answer in engine.search(requests, states)]
    weight = bundle.neighbours_weight
    for history, each, scores in zip(histories, told, found, strict=True):
        expected, _ = score_all_items(bundle, history, (), neighbours_weight=weight, events=each)
        np.testing.assert_allclose([scores[row] for row in range(40)], expected, atol=1e-4)
    values = [np.array([scores[row] for row in range(40)]) for scores in found]
    assert np.abs(values[0] - values[2]).max() > 1e-3
    if not bundle.settings.suffix_tokens:  # all items at once say as little as no times at all
        np.testing.assert_allclose(values[2], values[3], atol=1e-4)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_the_reference_reads_the_newest_events_as_every_runtime_does(runtime: Any) -> None:
    bundle = tiny_model(40, time_bias=True, suffix_tokens=(1,), neighbours=True, neighbours_weight=0.5, max_items=4)
    told = EventData(np.linspace(0.2, 1, 6, dtype=np.float32), TIMES)
    engine = Engine(bundle, runtime=runtime)
    [answer] = engine.search([Request(HISTORY, 40, 40, 0, events=told)], engine.encode([HISTORY]))
    scores = dict(zip(answer.items, answer.scores, strict=True))
    expected, _ = score_all_items(bundle, HISTORY, (), neighbours_weight=0.5, events=told)
    np.testing.assert_allclose([scores[row] for row in range(40)], expected, atol=1e-4)
    newest = EventData(told.weights[-4:], TIMES[-4:])
    same, _ = score_all_items(bundle, HISTORY[-4:], (), neighbours_weight=0.5, events=newest)
    np.testing.assert_allclose(expected, same)
