"""GET /popular and /trending, and the same lists for users of whom nothing is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.items.catalogue import Catalogue
from serving.online import counters
from serving.types import Rules
from tests.app.conftest import Gate, ShapedEngine, Start
from tests.app.test_feedback import send
from tests.app.test_recommend import HISTORY, ask, ids
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually


def happened(client: TestClient, *items: str, users: int = 1) -> None:
    for number in range(users):
        assert client.post(f"/users/buyer{number}/events", json={"items": list(items)}).is_success


def test_popular_has_what_users_took_and_then_the_bundles(client: TestClient, engine: ShapedEngine) -> None:
    bundles = [f"i{row}" for row in engine.bundle.catalogue.popular(60, Rules())]
    before = client.get("/popular", params={"k": 60}).json()
    assert [item["item_id"] for item in before["items"]] == bundles and before["events"] == 0
    happened(client, "i7", "i3", "i7", "not there", users=3)
    happened(client, "i3")
    found = client.get("/popular", params={"k": 4, "window": "day"})
    assert ids(found) == ["i3", "i7", *[item for item in bundles if item not in ("i3", "i7")][:2]]
    body = found.json()
    assert [item["score"] for item in body["items"]] == pytest.approx([4, 3, 0, 0], abs=0.1)
    assert body["events"] == pytest.approx(7, abs=0.1) and body["window"] == "day" and body["shared"] is False
    assert body["items"][0]["title"] == "Thing number 3" and body["model_version"] == "tiny-0"


def test_feedback_counts_once_and_only_what_was_taken(client: TestClient) -> None:
    answer = ask(client, 0, user_id="u", history=HISTORY).json()
    for index, event in enumerate(("impression", "dislike", "click", "purchase")):
        for _ in range(2):
            assert send(client, answer, index, event).status_code == 200
    found = client.get("/popular").json()
    assert found["events"] == pytest.approx(2, abs=0.01)
    assert {item["item_id"] for item in found["items"][:2]} == {answer["items"][i]["item_id"] for i in (2, 3)}


def test_both_keep_rules(client: TestClient) -> None:
    happened(client, *(f"i{row}" for row in range(10)))
    for path in ("/popular", "/trending"):
        assert set(ids(client.get(path, params={"categories": "odd", "deny": ["i1", "i3"], "k": 3}))) == {
            "i5", "i7", "i9",
        }  # fmt: skip
        assert set(ids(client.get(path, params={"catalogue": "small", "allow": ["i2", "i44", "x"]}))) == {"i2"}
        assert set(ids(client.get(path, params={"filter": 'not categories has "odd"', "k": 4}))) < {
            "i0", "i2", "i4", "i6", "i8",
        }  # fmt: skip
        assert client.get(path, params={"allow": ["i2", "x"]}).json()["unknown_items"] == ["x"]
        assert client.get(path, params={"catalogue": "none"}).status_code == 404
        for wrong in ({"k": 0}, {"k": 101}, {"window": "year"}, {"categories": "none"}, {"other": 1}):
            refused = client.get(path, params=wrong)
            assert refused.status_code == 422 and refused.json()["field"] == next(iter(wrong))
    assert client.get("/trending", params={"window": "month"}).status_code == 422


def test_trending_has_only_what_rises(client: TestClient, engine: ShapedEngine) -> None:
    assert ids(client.get("/trending")) == []
    rare = int(engine.bundle.catalogue.popularity.argmin())
    happened(client, f"i{rare}", users=9)
    happened(client, *(f"i{row}" for row in range(60)))
    found = client.get("/trending", params={"window": "hour"}).json()["items"]
    assert found[0]["item_id"] == f"i{rare}" and found[0]["score"] > 2 * found[1]["score"] > 0


@pytest.mark.parametrize("kind", ["popular", "trending"])
def test_a_user_of_whom_nothing_is_known_may_get_the_same_list(start: Start, kind: str) -> None:
    client = start(cold_list=kind)
    bundles = ids(start().get("/popular", params={"k": 12}))
    assert ids(ask(client, k=12)) == bundles
    happened(client, *bundles[-2:], users=5)
    listed = ids(client.get(f"/{kind}", params={"k": 12}))
    cold = ask(client, user_id="new", k=12)
    assert set(listed[:2]) == set(bundles[-2:]) and cold.json()["source"] == "popularity"
    assert ids(cold) == [*listed, *[item for item in bundles if item not in listed]][:12]
    ranked = client.post("/rank", json={"items": [bundles[0], bundles[-1]]})
    assert ids(ranked) == [bundles[-1], bundles[0]]
    diverse = ask(client, k=12, max_per_category=2)
    assert len(ids(diverse)) == 4 and ids(diverse)[0] == ids(cold)[0]


def test_replicas_count_together_and_go_on_without_redis(
    start: Start, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "FLUSH_AFTER", 0.01)
    monkeypatch.setattr(counters, "REFRESH_AFTER", 0.0)
    options: dict[str, Any] = {"redis_url": redis_server.url, "redis_store_timeout_ms": 2000, "cold_list": "popular"}
    one, other = start(**options), start(**options)
    happened(one, "i7", users=2)
    happened(other, "i7", "i3")

    def has_all(client: TestClient) -> bool:
        found = client.get("/popular", params={"k": 2}).json()
        return bool(found["shared"] and [item["item_id"] for item in found["items"]] == ["i7", "i3"])

    eventually(lambda: has_all(one) and has_all(other))
    redis_server.kill()
    for client in (one, other):
        assert has_all(client) and ids(ask(client, k=2)) == ["i7", "i3"]
        assert client.get("/trending").status_code == 200


def test_a_pass_over_the_catalogue_keeps_no_other_request_waiting(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For users of whom nothing is known, and behind what is popular now."""
    passing, popular = Gate(), Catalogue.popular

    def held(*arguments: Any) -> list[int]:
        passing()
        return popular(*arguments)

    monkeypatch.setattr(Catalogue, "popular", held)
    monkeypatch.setattr("serving.items.catalogue.WALKED", 10)
    boost = [{"filter": 'categories has "odd"', "factor": 1000}]
    with ThreadPoolExecutor(2) as pool:
        boosted = pool.submit(ask, client, k=29, boost=boost)
        assert passing.reached.wait(DEADLINE)
        behind = pool.submit(client.get, "/popular?k=60")
        assert client.get("/livez").status_code == 200 and ask(client, k=5).json()["source"] == "popularity"
        passing.opened.set()
        assert all(int(item[1:]) % 2 for item in ids(boosted.result()))
        assert ids(behind.result()) == ids(ask(client, k=60, beam_width=60))
