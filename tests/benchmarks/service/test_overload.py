"""What the overload's benchmark says of a turn, and when it lets a bar hold: by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.service.overload import CALLERS, at, caller, judged, plot, requests, told
from benchmarks.service.sender import Sent
from tests.builders import tiny_bundle


def test_a_turn_by_hand() -> None:
    sent = [
        Sent(0.5, 0.0, 0.1, 200),  # before the queue has settled
        Sent(1.5, 0.0, 0.9, 200, queue=0.8),  # due before, answered inside
        Sent(2.0, 0.0, 1.0, 200, queue=0.9),
        Sent(3.0, 0.0, 2.5, 200, queue=2.4),  # too late
        Sent(3.5, 0.1, 0.102, 503, retry_after=2),
        Sent(4.0, 0.2, 0.206, 503),
        Sent(4.5, 0.0, 0.5, 504),
        Sent(5.0, 0.0),  # never answered
        Sent(5.5, 0.0, 1.0, 200, queue=0.9),  # due inside, answered after the end
    ]
    row = told(sent, settle=2.0, end=6.0, budget_ms=2000)
    assert row["goodput_per_s"] == 2 / 4 and row["refused_per_s"] == 2 / 4
    assert (row["p50_ms"], row["p99_ms"], row["waited_s"]) == (1000, 1000, 0.9)
    assert (row["refusal_p50_ms"], row["refusal_p99_ms"]) == (2, 6)
    assert (row["asked"], row["other"], row["silent"], row["full"]) == (7, 3, 1, 2)
    assert (row["told_least"], row["told_most"]) == (-0.9, 1.1)  # the two say 0 and 2 s beside one that waited 0.9
    nothing = told([], settle=2.0, end=6.0, budget_ms=2000)
    assert nothing["goodput_per_s"] == 0 and nothing["p99_ms"] is nothing["told_least"] is None


def test_quantiles() -> None:
    assert [at(share, [3.0, 1.0, 2.0]) for share in (0.0, 0.5, 0.99)] == [1, 2, 3]
    assert at(0.5, []) is None


def test_one_client_of_two_asks_a_sixth_of_the_capacity(tmp_path: Path) -> None:
    asked = requests(tiny_bundle(tmp_path / "tiny"), 2, 500)
    assert {one["body"]["timeout_ms"] for one in asked} == {500} and "reasoning_steps=2" in asked[0]["path"]
    names = [caller(number % len(asked)) for number in range(3 * len(asked))]
    assert names.count(CALLERS[0]) == len(names) / 32


def turn(part: str, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"part": part, "asked_per_s": 500.0, "goodput_per_s": 80.0, "refused_per_s": 400.0}
    row |= {"p99_ms": 900.0, "refusal_p99_ms": 20.0, "other": 0, "asked": 1000, "silent": 0, "full": 0}
    return row | {"told_least": 0.1, "told_most": 0.9, "peak_mb": 300.0} | values


def rows(**worse: Any) -> list[dict[str, Any]]:
    within, beyond = (f"quota: {name}" for name in CALLERS)
    return [
        turn("best", asked_per_s=100.0, goodput_per_s=100.0, refused_per_s=0.0, refusal_p99_ms=None),
        turn("overload", **worse),
        turn("queue"),
        turn(within, refused_per_s=worse.get("refused_within", 0.0)),
        turn(beyond, full=worse.get("full_beyond", 0)),
    ]


def test_a_service_that_keeps_its_goodput_holds_every_bar() -> None:
    assert [bar["bar"] for bar in judged(rows()) if not bar["holds"]] == []


@pytest.mark.parametrize(
    ("worse", "bar"),
    [
        ({"goodput_per_s": 79.0}, "goodput at 5 times / best"),
        ({"refusal_p99_ms": 101.0}, "refusals, p99 in ms"),
        ({"other": 4}, "share neither in time nor refused"),
        ({"silent": 1}, "refusals without Retry-After"),
        ({"told_least": -1.1}, "Retry-After less the wait, least, s"),
        ({"told_most": 2.1}, "Retry-After less the wait, most, s"),
        ({"peak_mb": 351.0}, "memory beyond the best rate's, MB"),
        ({"full_beyond": 1}, "over its quota, yet 503"),
        ({"refused_within": 0.5}, "within its quota, yet refused"),
    ],
)
def test_a_bar_names_what_is_wrong(worse: dict[str, Any], bar: str) -> None:
    assert [found["bar"] for found in judged(rows(**worse)) if not found["holds"]] == [bar]


def test_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot([turn("ladder", asked_per_s=50.0, refusal_p99_ms=None), *rows()], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
