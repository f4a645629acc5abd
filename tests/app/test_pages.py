"""`after`: an answer that goes on behind another one, without repeating anything."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import Start
from tests.app.test_feedback import send
from tests.app.test_recommend import HISTORY, ask, ids


def pages(client: TestClient, count: int, **body: Any) -> list[list[str]]:
    found: list[list[str]] = []
    for _ in range(count):
        answer = ask(client, 2, **body)
        found.append(ids(answer))
        body["after"] = answer.json()["recommendation_id"]
    return found


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"history": []},  # popular ones
        {"diversity": 0.5},
        {"max_per_category": 9},
        {"categories": ["odd"], "deny": ["i5"]},
        {"explain": True},
    ],
    ids=["plain", "popular", "diverse", "categories", "rules", "explained"],
)
def test_pages_are_one_larger_answer(shared: TestClient, more: dict[str, Any]) -> None:
    body = {"history": HISTORY, "beam_width": 40} | more
    whole = ids(ask(shared, 2, **body, k=18))
    first, second, third = pages(shared, 3, **body, k=6)
    assert [*first, *second, *third] == whole and len(second) == 6


def test_pages_end_with_the_widest_beam(start: Start) -> None:
    client = start(max_beam_width=25, default_beam_width=10)
    found = pages(client, 5, history=HISTORY, k=10)
    assert [len(page) for page in found] == [10, 10, 5, 0, 0]
    assert len({item for page in found for item in page}) == 25
    assert [len(page) for page in pages(client, 4, history=HISTORY, k=10, allow=["i7", "i9"])] == [2, 0, 0, 0]


def test_nothing_is_repeated_when_the_history_has_gone_on(client: TestClient) -> None:
    client.post("/users/u/events", json={"items": HISTORY})
    shown: list[str] = []
    after = {}
    for _ in range(4):
        answer = ask(client, 1, user_id="u", k=8, **after)
        assert not {*shown, *HISTORY} & {*ids(answer)} and len(ids(answer)) == 8
        shown += ids(answer)
        client.post("/users/u/events", json={"items": [shown[-1], shown[0]]})
        after = {"after": answer.json()["recommendation_id"]}
    new = ask(client, user_id="new", k=8, after=ask(client, history=HISTORY, k=8).json()["recommendation_id"]).json()
    assert new["source"] == "popularity" and len(new["items"]) == 8


def test_feedback_counts_positions_on(client: TestClient) -> None:
    first = ask(client, user_id="u", history=HISTORY, k=6).json()
    second = ask(client, user_id="u", history=HISTORY, k=6, after=first["recommendation_id"]).json()
    assert send(client, second, 1).json()["position"] == 8
    other = {"recommendation_id": second["recommendation_id"], "item_id": first["items"][0]["item_id"]}
    assert client.post("/feedback", json=other | {"event": "click"}).json()["field"] == "item_id"


def test_an_id_that_this_service_has_not_given_is_422(start: Start) -> None:
    client, other = start(user_hash_key="ours"), start(user_hash_key="theirs")
    foreign = ask(other, history=HISTORY).json()["recommendation_id"]
    for after in (foreign, "x", ""):
        refused = ask(client, history=HISTORY, after=after)
        assert refused.status_code == 422 and refused.json()["field"] == "after"
    batch = client.post("/recommend/batch", json={"requests": [{"history": HISTORY, "after": "x"}, {}]}).json()
    assert batch["results"][0]["field"] == "after" and batch["results"][1]["items"]
