"""The summary of a turn and the verdict of every bar, from requests and rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.service.overload import caller, plot, requests
from benchmarks.service.overload_summary import CALLERS, bars, summarise
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
        Sent(4.2, 0.0, 0.002, 429, retry_after=1),
        Sent(4.3, 0.0, 0.002, 429, retry_after=1),
        Sent(4.5, 0.0, 0.5, 504),
        Sent(5.0, 0.0),  # never answered
        Sent(5.5, 0.0, 1.0, 200, queue=0.9),  # due inside, answered after the end
    ]
    row = summarise(sent, settle=2.0, end=6.0, budget_ms=2000)
    assert row["goodput_per_s"] == 2 / 4 and row["refused_per_s"] == 4 / 4
    assert (row["p50_ms"], row["p99_ms"], row["waited_s"]) == (1000, 1000, 0.9)
    assert (row["refusal_p50_ms"], row["refusal_p99_ms"]) == (2, 6)
    assert (row["sent"], row["lost"], row["without_retry_after"], row["passed_per_s"]) == (9, 3, 1, 1.8)
    # the refusals say 0, 1 and 2 s, the request admitted next waited 0.9 s
    assert (row["retry_error_low"], row["retry_error_high"]) == (-0.9, 1.1)
    nothing = summarise([], settle=2.0, end=6.0, budget_ms=2000)
    assert nothing["goodput_per_s"] == 0 and nothing["p99_ms"] is nothing["retry_error_low"] is None


def test_the_client_within_its_quota_sends_a_sixth_of_the_capacity(tmp_path: Path) -> None:
    bodies = requests(tiny_bundle(tmp_path / "tiny"), 2, 500)
    assert {one["body"]["timeout_ms"] for one in bodies} == {500} and "reasoning_steps=2" in bodies[0]["path"]
    names = [caller(number % len(bodies)) for number in range(3 * len(bodies))]
    assert names.count(CALLERS[0]) == len(names) / 32


def turn(part: str, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"part": part, "offered_per_s": 500.0, "goodput_per_s": 80.0, "refused_per_s": 400.0}
    row |= {"p99_ms": 900.0, "refusal_p99_ms": 20.0, "lost": 0, "sent": 1000, "without_retry_after": 0}
    return row | {"retry_error_low": 0.1, "retry_error_high": 0.9, "peak_mb": 300.0} | values


def rows(**worse: Any) -> list[dict[str, Any]]:
    within, beyond = (f"quota: {name}" for name in CALLERS)
    return [
        turn("best", offered_per_s=100.0, goodput_per_s=100.0, refused_per_s=0.0, refusal_p99_ms=None),
        turn("overload", **worse),
        turn("queue"),
        turn(within, refused_per_s=worse.get("refused_within", 0.0)),
        turn(beyond, quota_per_s=40, passed_per_s=worse.get("passed", 40.0)),
        turn("light alone", goodput_per_s=80.0),
        turn("light beside heavy", goodput_per_s=worse.get("light", 60.0)),
    ]


def test_a_service_that_keeps_its_goodput_holds_every_bar() -> None:
    assert [bar["bar"] for bar in bars(rows(), 2000) if not bar["holds"]] == []


def test_a_bar_over_several_turns_has_their_median_and_range() -> None:
    best = turn("best", offered_per_s=100.0, goodput_per_s=100.0, refused_per_s=0.0, refusal_p99_ms=None)
    turns = [turn("overload", goodput_per_s=goodput) for goodput in (101.0, 78.0, 88.0)]
    first, *_ = bars([best, best, best, *turns, *rows()[2:]], 2000)
    assert (first["value"], first["lowest"], first["highest"], first["holds"]) == ("0.88", "0.78", "1.01", True)


@pytest.mark.parametrize(
    ("worse", "bar"),
    [
        ({"goodput_per_s": 79.0}, "answered within 2,000 ms a second, at 5 times the load / at the best load"),
        ({"refusal_p99_ms": 101.0}, "refusals, p99 in ms"),
        ({"lost": 2}, "share neither answered within 2,000 ms nor refused"),
        ({"without_retry_after": 1}, "refusals without Retry-After"),
        ({"retry_error_low": -1.1}, "Retry-After minus the wait, 5% quantile, s"),
        ({"retry_error_high": 2.1}, "Retry-After minus the wait, 95% quantile, s"),
        ({"peak_mb": 351.0}, "peak memory above the best load's, MB"),
        ({"passed": 41.0}, "requests that pass the quota / the quota"),
        ({"refused_within": 0.5}, "within its quota, yet refused, a second"),
        ({"light": 39.0}, "answers to two light clients a second, beside 64 connections of another / alone"),
    ],
)
def test_a_bar_names_what_is_wrong(worse: dict[str, Any], bar: str) -> None:
    assert [found["bar"] for found in bars(rows(**worse), 2000) if not found["holds"]] == [bar]


def test_loads_without_refusals_are_drawn_too(tmp_path: Path) -> None:
    plot({"rows": [turn("ladder", offered_per_s=50.0, refusal_p99_ms=None), *rows()]}, tmp_path / "overload.svg")
    assert "answered in time" in (tmp_path / "overload.svg").read_text()
