"""Whatever history and rules are sent, an answer keeps them: held against the rules written down once more."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from tests.answers import assert_same_answer
from tests.app.test_recommend import ask

ITEMS = 60  # of the tiny model: i0 to i59, even and odd ones, i0 to i4 in the catalogue `small`
ids = st.one_of(st.integers(0, ITEMS - 1).map(lambda row: f"i{row}"), st.sampled_from(["new", "i60", "I1", "ü", "i1 "]))
lists = st.lists(ids, max_size=12)
bodies = st.fixed_dictionaries(
    {"k": st.integers(1, 60)},
    optional={
        "history": st.lists(ids, max_size=30),
        "beam_width": st.integers(60, 100),
        "exclude_seen": st.booleans(),
        "allow": st.lists(ids, max_size=40),
        "deny": lists,
        "categories": st.lists(st.sampled_from(["even", "odd"]), max_size=2),
        "catalogue": st.just("small"),
        "dense_weight": st.sampled_from([0, 0.5]),
        "neighbours_weight": st.sampled_from([0, 2.5]),
        "explain": st.booleans(),
    },
)


def known(sent: list[str]) -> set[int]:
    return {int(each[1:]) for each in sent if each in {f"i{row}" for row in range(ITEMS)}}


def permitted(body: dict[str, Any]) -> set[int]:
    rows = set(range(ITEMS)) - known(body.get("deny", []))
    if body.get("exclude_seen", True):
        rows -= known(body.get("history", []))
    if body.get("allow") is not None:
        rows &= known(body["allow"])
    if wanted := body.get("categories"):
        rows &= {row for row in rows if ("even", "odd")[row % 2] in wanted}
    if "catalogue" in body:
        rows &= set(range(5))
    return rows


@profile(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies, steps=st.sampled_from([0, 1, 4, "auto"]))
def test_an_answer_keeps_every_rule(shared: TestClient, body: dict[str, Any], steps: int | str) -> None:
    response = ask(shared, steps, **body)
    assert response.status_code == 200, response.text
    answer = response.json()
    rows = [int(item["item_id"][1:]) for item in answer["items"]]
    allowed = permitted(body)
    assert set(rows) <= allowed and len(set(rows)) == len(rows)
    assert len(rows) == min(body["k"], len(allowed))  # every one that is permitted, where the beam has room for all
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    sent = body.get("history", []) + body.get("deny", []) + (body.get("allow") or [])
    assert set(answer["unknown_items"]) == {each for each in sent if not known([each])}
    assert len(answer["unknown_items"]) == len(set(answer["unknown_items"]))
    assert answer["source"] == ("model" if known(body.get("history", [])) else "popularity")


@profile(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(ids, min_size=1, max_size=30), cut=st.integers(0, 30))
def test_only_known_items_and_the_newest_of_them_count(shared: TestClient, history: list[str], cut: int) -> None:
    """Unknown items anywhere, and what lies before the model's window (six items), change no score."""
    rules = {"exclude_seen": False, "k": 10}
    clean = [each for each in history if known([each])][-6:]
    dirty = history[:cut] + ["never heard of"] + history[cut:]
    one, other = (ask(shared, 2, history=each, **rules).json()["items"] for each in (clean, dirty))
    assert_same_answer(one, other)


@profile(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(chunks=[["i1"]], user="\n")
@given(
    chunks=st.lists(st.lists(ids, min_size=1, max_size=8), min_size=1, max_size=5),
    user=st.text(min_size=1, max_size=40),
)
def test_events_in_pieces_are_the_history_in_one(shared: TestClient, chunks: list[list[str]], user: str) -> None:
    address = f"/users/{quote(user, safe='')}"
    try:
        for chunk in chunks:
            stored = shared.post(f"{address}/events", json={"items": chunk})
            assert stored.status_code == 200, stored.text
        assert shared.get(address).json()["items"] == [item for chunk in chunks for item in chunk]
        one, other = (
            ask(shared, 2, user_id=user),
            ask(shared, 2, history=[item for chunk in chunks for item in chunk]),
        )
        assert_same_answer(one.json()["items"], other.json()["items"])
    finally:
        assert shared.delete(address).status_code == 204
    assert shared.get(address).status_code == 404
