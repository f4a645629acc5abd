"""The demo bundle answers as it did: a change of the code's shape must not change what a client reads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.app import demo_answers

CLOSE = 1e-4  # of a score; processors and kernels differ by less


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return demo_answers.answers()


def test_the_demo_bundle_answers_as_recorded(answers: list[dict[str, Any]]) -> None:
    recorded = demo_answers.load()
    assert len(answers) == len(recorded) >= 200
    for number, (now, then) in enumerate(zip(answers, recorded, strict=True)):
        assert alike(now, then), f"request {number}: {now} != {then}"


def test_a_changed_answer_is_noticed() -> None:
    then = demo_answers.load()[0]
    first, second, *rest = then["body"]["items"]
    assert alike(then, then)
    for items in ([second, first, *rest], [first, *rest], [first | {"score": first["score"] + 0.01}, second, *rest]):
        assert not alike(then | {"body": then["body"] | {"items": items}}, then)


def alike(now: Any, then: Any) -> bool:
    """Equal but for what another kernel may round otherwise: scores by `CLOSE`, and the order of equal scores."""
    if isinstance(now, dict) and isinstance(then, dict):
        if now.keys() != then.keys():
            return False
        return all(alike_items(now, then) if key == "items" else alike(now[key], then[key]) for key in now)
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(alike, now, then))
    if isinstance(now, float) and isinstance(then, float):
        return abs(now - then) <= CLOSE * max(1.0, abs(then))
    return bool(now == then)


def alike_items(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Items of a ranking; where recorded scores are further apart than rounding, the order counts."""
    ours, theirs = now["items"], then["items"]
    if not isinstance(theirs, list) or not theirs or not isinstance(theirs[0], dict) or "score" not in theirs[0]:
        return alike(ours, theirs)
    by_id = {item["item_id"]: item for item in ours}
    scores = [item["score"] for item in theirs]
    apart = all(high - low > 2 * CLOSE * max(1.0, abs(high)) for high, low in pairwise(scores))
    if apart:
        return alike(ours, theirs)
    # The last place may go to another of equal score.
    certain = [item for item in theirs if item["score"] - scores[-1] > 2 * CLOSE * max(1.0, abs(scores[-1]))]
    return len(ours) == len(theirs) and all(
        item["item_id"] in by_id and alike(by_id[item["item_id"]], item) for item in certain
    )
