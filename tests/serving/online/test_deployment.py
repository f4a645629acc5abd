"""What changes of models add up to, and who is in which arm, without a model."""

from __future__ import annotations

from collections import Counter

import pytest

from serving.errors import Conflict, ServingError, UnknownModel
from serving.online.deployment import Arm, Deployment, Shadow, Traffic
from serving.online.models import changed

START = Deployment(base="a", active="a")


def after(*changes: dict[str, object], start: Deployment = START) -> Deployment:
    """The deployment after those changes that fit."""
    for change in changes:
        try:
            start = changed(start, {"base": "a", **change})
        except ServingError:
            continue
    return start


def test_changes_add_up_and_those_that_do_not_fit_change_nothing() -> None:
    add_b, use_b, drop_b = ({"do": do, "version": "b", "path": "p"} for do in ("add", "activate", "retire"))
    assert after(add_b, use_b) == Deployment("a", "b", {"b": "p"})
    assert after(use_b, add_b) == Deployment("a", "a", {"b": "p"})  # it was not there yet
    assert after(add_b, use_b, drop_b) == Deployment("a", "b", {"b": "p"})  # it answers
    assert after(add_b, drop_b, use_b) == START
    assert after(add_b, add_b, use_b, {"do": "activate", "version": "a"}, drop_b) == START
    assert after(add_b | {"base": "z"}) == START  # of a service that was started with another bundle
    assert after({"do": "from the future"}) == START


def test_traffic_names_models_that_are_loaded_and_keeps_them() -> None:
    arms, shadow = [{"version": "b", "percent": 10.0, "reasoning_steps": 4}], {"version": "a", "percent": 5.0}
    split = {"do": "direct", "name": "x", "arms": arms, "shadow": shadow}
    assert after(split) == START
    split_over = after({"do": "add", "version": "b", "path": "p"}, split)
    assert split_over.traffic == Traffic("x", (Arm("b", 10.0, 4),), Shadow("a", 5.0))
    with pytest.raises(Conflict, match="Traffic is sent to this model"):
        split_over.retired("b")
    with pytest.raises(UnknownModel):
        split_over.activated("c")


def test_arms_have_their_shares_whatever_the_ids_and_another_name_deals_anew() -> None:
    one, two = (Traffic(name, (Arm("a", 20), Arm("b", 30))) for name in ("one", "two"))
    users = [f"user {number}" for number in range(4000)]

    def dealt(traffic: Traffic, secret: bytes = b"") -> list[str]:
        return [arm.version if arm else "" for arm in (traffic.arm_of(user, secret) for user in users)]

    found = dealt(one)
    counts = Counter(found)
    assert abs(counts["a"] - 800) < 150 and abs(counts["b"] - 1200) < 150 and abs(counts[""] - 2000) < 150
    assert dealt(one) == found
    for other in (dealt(two), dealt(one, b"secret")):  # independent: both in arm a as often as chance has it
        both = sum(here == there == "a" for here, there in zip(found, other, strict=True))
        assert abs(both - 160) < 60


def test_without_a_user_an_arm_is_drawn_and_without_arms_there_is_none() -> None:
    everybody = Traffic("x", (Arm("a", 100),))
    assert {everybody.arm_of(None) for _ in range(100)} == {everybody.arms[0]}
    half = Traffic("x", (Arm("a", 50),))
    assert {half.arm_of(None) for _ in range(100)} == {half.arms[0], None}
    assert Traffic().arm_of("u") is None
