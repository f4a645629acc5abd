"""`rotation`: what a user was shown and did not take goes down in their lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import Start
from tests.app.test_feedback import send
from tests.app.test_recommend import HISTORY, ask, ids
from tests.conftest import RedisServer
from tests.waiting import DEADLINE


@pytest.fixture
def client(start: Start) -> TestClient:
    return start(rotation_window_s=3600)


def lists(client: TestClient, **body: Any) -> Any:
    return ask(client, 1, **({"user_id": "u", "history": HISTORY, "k": 8, "beam_width": 57} | body))


def see(client: TestClient, answer: Any, count: int) -> None:
    for index in range(count):
        assert send(client, answer, index, "impression").status_code == 200


def test_what_was_shown_and_not_taken_goes_down_by_the_factor(client: TestClient) -> None:
    before = lists(client, k=57).json()
    plain = [item["item_id"] for item in before["items"]]
    see(client, before, 4)
    send(client, before, 1, "click")
    send(client, before, 2, "dislike")
    low = {plain[0], plain[2], plain[3]}
    for rotation, factor in ((0.3, math.log(0.7)), (0.9, math.log(0.1)), (1.0, -math.inf)):
        key = {item["item_id"]: item["score"] + factor * (item["item_id"] in low) for item in before["items"]}
        if rotation == 1.0:
            expected = [item for item in plain if item not in low] + [item for item in plain if item in low]
        else:
            expected = sorted(plain, key=lambda item: -key[item])
        found = lists(client, k=57, rotation=rotation)
        assert ids(found) == expected
        assert {i["item_id"]: i["score"] for i in found.json()["items"]} == pytest.approx(
            {i["item_id"]: i["score"] for i in before["items"]}, abs=1e-4
        )
        assert ids(lists(client, rotation=rotation)) == expected[:8]
    assert ids(lists(client)) == plain[:8]  # off by default
    assert (
        ids(lists(client, user_id="another", rotation=1)) == ids(lists(client, user_id=None, rotation=1)) == plain[:8]
    )


def test_popular_lists_and_diverse_ones_rotate_too(client: TestClient) -> None:
    popular = lists(client, history=[], k=60, beam_width=60).json()
    see(client, popular, 1)
    order = [item["item_id"] for item in popular["items"]]
    assert ids(lists(client, history=[], rotation=1, beam_width=60)) == order[1:9]
    assert ids(lists(client, history=[], rotation=0.02, beam_width=60)) == [order[1], order[0], *order[2:8]]
    diverse = lists(client, diversity=0.3).json()
    see(client, diverse, 8)
    assert not {*ids(lists(client, diversity=0.01, rotation=1))} & {item["item_id"] for item in diverse["items"]}


def test_what_is_kept_is_shown_to_its_user_and_erased(client: TestClient) -> None:
    answer = lists(client).json()
    see(client, answer, 2)
    shown = [item["item_id"] for item in answer["items"][:2]]
    assert client.get("/users/u").json()["shown"] == shown
    nobody = lists(client, user_id=None).json()
    see(client, nobody, 2)
    assert client.delete("/users/u").status_code == 204
    assert client.get("/users/u").status_code == 404
    assert ids(lists(client, rotation=1)) == [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize("options", [{}, {"rotation_window_s": 60, "workers": 2}])
def test_without_a_place_to_keep_it_rotation_is_422(start: Start, options: dict[str, int]) -> None:
    client = start(**options)
    see(client, lists(client).json(), 2)
    refused = lists(client, rotation=0.5)
    assert refused.status_code == 422 and refused.json()["field"] == "rotation"
    assert lists(client, rotation=0).status_code == 200


def test_replicas_rotate_together_and_answer_without_redis(start: Start, redis_server: RedisServer) -> None:
    options: dict[str, Any] = {
        "redis_url": redis_server.url, "redis_store_timeout_ms": 1000 * DEADLINE, "rotation_window_s": 60, "replicas": 2
    }  # fmt: skip
    one, other = start(**options), start(**options)
    answer = lists(one).json()
    see(one, answer, 3)
    plain = [item["item_id"] for item in answer["items"]]
    assert ids(lists(other, rotation=1))[:5] == plain[3:]
    redis_server.kill()
    assert ids(lists(other, rotation=1)) == plain
