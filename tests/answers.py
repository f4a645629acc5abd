"""When two answers are the same. Another kernel, batch shape or alignment of the weights rounds otherwise: scores may
differ by their last digits, and items whose scores differ by no more may swap. Nothing else may."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from serving.types import Answer

TOLERANCE = 1e-4  # of a log-probability; float32 kernels differ by some 1e-6, and a mistake by far more
Scored = Answer | Sequence[tuple[Any, float]] | Sequence[dict[str, Any]]


def assert_same_answer(ours: Scored, theirs: Scored, tolerance: float = TOLERANCE) -> None:
    """Holds an answer of the engine, (item, score) pairs or the items of a JSON answer against another one.

    Scores agree rank by rank and item by item. Only at the end of the list may an item be in one answer alone: one
    whose score equals the last score, and so could have been cut in the other.
    """
    one, two = _pairs(ours), _pairs(theirs)
    assert len(one) == len(two), f"{len(one)} items against {len(two)}: {one} and {two}"
    first, second = dict(one), dict(two)
    assert len(first) == len(one) and len(second) == len(two), f"an item came twice: {one} and {two}"
    if not one:
        return
    np.testing.assert_allclose([score for _, score in one], [score for _, score in two], rtol=0, atol=tolerance)
    last = two[-1][1]
    for item in first.keys() | second.keys():
        score, other = first.get(item, last), second.get(item, last)
        assert abs(score - other) <= tolerance, f"item {item} differs: {one} and {two}"


def assert_same_answers(ours: Iterable[Scored], theirs: Iterable[Scored], tolerance: float = TOLERANCE) -> None:
    """The same for the answers to several requests."""
    for one, other in zip(ours, theirs, strict=True):
        assert_same_answer(one, other, tolerance)


def _pairs(answer: Scored) -> list[tuple[Any, float]]:
    if isinstance(answer, Answer):
        return list(zip(answer.items, answer.scores, strict=True))
    return [(each["item_id"], each["score"]) if isinstance(each, dict) else tuple(each) for each in answer]  # type: ignore[misc]
