"""Users, items and models."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from serving.engine import Engine
from serving.online.costs import WINDOW
from tests.answers import assert_same_answer
from tests.app.conftest import ShapedEngine, Start, ready, settings
from tests.app.test_recommend import ask, ids
from tests.builders import measured_gains, tiny_model
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually


def test_a_known_history_answers_like_a_sent_one(client: TestClient) -> None:
    stored = client.post("/users/u1/events", json={"items": ["i1", "new"]}).json()
    assert stored == {"user_id": "u1", "stored": 2, "history_length": 2, "unknown_items": ["new"]}
    client.post("/users/u1/events", json={"items": ["i2", "i3"]})
    known = ask(client, 2, user_id="u1", k=6)
    assert known.json()["source"] == "model" and known.json()["unknown_items"] == ["new"]
    for same in ({"history": ["i1", "i2", "i3"]}, {"user_id": "u1", "history": []}):
        assert_same_answer(ask(client, 2, **same, k=6).json()["items"], known.json()["items"])
    assert ids(ask(client, 2, user_id="u1", history=["i9"], k=6)) != ids(known)  # what is sent comes first


def test_items_of_a_bundle_are_shown_whatever_their_fields() -> None:
    """What operators put has bounds; what a model was trained with has none."""
    bundle = tiny_model()
    fields = {"text": "é" * 5000, "tags": [f"tag {n}" for n in range(300)], "n" * 200: 1.5, "new": True}
    fields |= {f"field {n:03}": n + 0.5 for n in range(100)}
    categories = [f"{n:0300}" for n in range(150)]
    bundle.catalogue.describe(3, "T" * 3000, categories, fields)
    bundle.catalogue.describe(4, None, [], {"": "", "one": ["x" * 2000]})
    with TestClient(create_app(settings(), Engine(bundle)), raise_server_exceptions=False) as client:
        found = ready(client).get("/items?limit=100")
        assert found.status_code == 200
        shown = {item["item_id"]: item for item in found.json()["items"]}
        assert len(shown) == 60 and shown["i3"]["fields"] == fields
        assert (shown["i3"]["title"], shown["i3"]["categories"]) == ("T" * 3000, categories)
        assert shown["i4"]["fields"] == {"": "", "one": ["x" * 2000]}
        assert client.get("/items/i3").json() == shown["i3"]
        assert client.get("/items/i1/similar?k=59").status_code == client.get("/popular?k=60").status_code == 200


def test_erasing_leaves_nothing(client: TestClient) -> None:
    client.post("/users/u1/events", json={"items": ["i1"]})
    ask(client, user_id="u1")
    known = {"user_id": "u1", "items": ["i1"], "cached": ["memory"], "shown": [], "feedback": 0}
    assert client.get("/users/u1").json() == known
    assert client.delete("/users/u1").status_code == 204
    assert client.get("/users/u1").status_code == 404
    assert ask(client, user_id="u1").json()["source"] == "popularity"
    assert ask(client, user_id="u1", history=["i1"]).json()["cache"] == "miss"
    assert client.delete("/users/nobody").status_code == 204


def test_erasing_leaves_nothing_in_redis(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, redis_store_timeout_ms=2000)
    client.post("/users/u1/events", json={"items": ["i1"]})
    ask(client, user_id="u1")
    assert client.get("/users/u1").json()["cached"] == ["memory", "redis"]
    assert len(redis_server.keys_of_users()) == 2
    assert client.delete("/users/u1").status_code == 204
    assert redis_server.keys_of_users() == []


def test_an_erasure_reaches_the_memory_of_other_replicas(start: Start, redis_server: RedisServer) -> None:
    options = {"redis_url": redis_server.url, "redis_timeout_ms": 2000, "redis_store_timeout_ms": 2000}
    one, other = start(**options), start(**options)
    for replica in (one, other):
        replica.post("/users/u1/events", json={"items": ["i1"]})
        ask(replica, user_id="u1")
    assert "memory" in other.get("/users/u1").json()["cached"]
    assert one.delete("/users/u1").status_code == 204
    eventually(lambda: other.get("/users/u1").status_code == 404)
    assert redis_server.keys_of_users() == []


def test_erasing_while_an_answer_is_computed_leaves_nothing(
    start: Start, engine: ShapedEngine, redis_server: RedisServer
) -> None:
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, redis_store_timeout_ms=2000)
    client.post("/users/u1/events", json={"items": ["i1"]})
    computing, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        computing.set()
        go_on.wait(DEADLINE)

    engine.before = hold
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, user_id="u1")
        assert computing.wait(DEADLINE)
        assert client.delete("/users/u1").status_code == 204
        go_on.set()
        assert answer.result().json()["cache"] == "miss"
    assert client.get("/users/u1").status_code == 404
    assert redis_server.keys_of_users() == []


def test_a_full_redis_refuses_events_and_costs_no_answer(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, redis_store_timeout_ms=2000, memory_cache_users=0)
    client.post("/users/u/events", json={"items": ["i1"]})
    redis_server.fill()
    refused = client.post("/users/u/events", json={"items": ["i2"]})
    assert refused.status_code == 503 and "make room" in refused.json()["detail"]
    for _ in range(5):
        answer = ask(client, user_id="u")
        assert answer.json()["source"] == "model" and answer.json()["cache"] == "miss"
    assert client.get("/users/u").json()["items"] == ["i1"]
    assert client.delete("/users/u").status_code == 204


def test_something_else_under_our_keys_costs_no_answer(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, redis_store_timeout_ms=2000, memory_cache_users=0)
    client.post("/users/u/events", json={"items": ["i1"]})
    ask(client, user_id="u")
    with redis_server.client() as redis:
        keys = redis_server.keys_of_users()
        assert len(keys) == 2
        for key in keys:
            redis.delete(key)
            redis.hset(key, "a", "b")
    assert ask(client, user_id="u").json()["source"] == "popularity"
    assert ask(client, user_id="u", history=["i1"]).json()["cache"] == "miss"
    assert client.post("/users/u/events", json={"items": ["i1"]}).status_code == 503
    assert client.delete("/users/u").status_code == 204
    assert client.post("/users/u/events", json={"items": ["i1"]}).status_code == 200


def test_a_user_id_is_any_string(client: TestClient) -> None:
    client.post("/users/a%2Fb%20ü/events", json={"items": ["i1"]})
    assert client.get("/users/a%2Fb%20ü").json()["user_id"] == "a/b ü"
    assert client.get("/users/a%2Fb%20ü%0A").status_code == 404  # a line break makes another user
    assert client.get(f"/users/{'x' * 300}").status_code == 422


@pytest.mark.parametrize(
    "body", [{}, {"items": []}, {"items": ["i1"] * 1001}, {"items": ["i1"], "x": 1}, {"items": [3]}]
)
def test_events_that_do_not_fit_are_422(client: TestClient, body: dict[str, object]) -> None:
    assert client.post("/users/u/events", json=body).status_code == 422


def test_events_are_acknowledged_only_when_stored(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url, redis_store_timeout_ms=2000)
    assert client.post("/users/u/events", json={"items": ["i1"]}).status_code == 200
    redis_server.kill()
    for response in (
        client.post("/users/u/events", json={"items": ["i2"]}),
        client.get("/users/u"),
        client.delete("/users/u"),
    ):
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
    answer = ask(client, user_id="u")  # an answer all the same, and the reason is counted
    assert answer.status_code == 200 and answer.json()["source"] == "popularity"
    assert 'streamrec_fallback_total{reason="store_unavailable"} 1.0' in client.get("/metrics").text
    assert ask(client, user_id="u", history=["i1"]).json()["source"] == "model"


def test_an_item_by_its_id(client: TestClient, engine: ShapedEngine) -> None:
    item = client.get("/items/i7").json()
    assert item["title"] == "Thing number 7" and item["categories"] == ["odd"]
    assert item["tokens"] == engine.bundle.catalogue.tokens[7].tolist()
    missing = client.get("/items/nope")
    assert missing.status_code == 404 and missing.headers["content-type"] == "application/problem+json"


def test_items_by_title_are_bounded_and_ordered_by_popularity(client: TestClient, engine: ShapedEngine) -> None:
    popularity = engine.bundle.catalogue.popularity
    found = client.get("/items", params={"query": "NUMBER 1", "limit": 5}).json()["items"]
    expected = sorted((row for row in range(60) if "1" in str(row)), key=lambda row: -popularity[row])[:5]
    assert [item["item_id"] for item in found] == [f"i{row}" for row in expected]
    assert len(client.get("/items").json()["items"]) == 20
    assert client.get("/items", params={"query": "nothing like it"}).json()["items"] == []
    assert client.get("/items", params={"limit": 101}).status_code == 422
    assert client.get("/items", params={"query": "x" * 101}).status_code == 422


def test_the_model_tells_its_bounds_and_its_cost(client: TestClient, engine: ShapedEngine) -> None:
    (model,) = client.get("/models").json()["models"]
    assert model["version"] == engine.bundle.version and model["items"] == 60
    assert (model["max_steps"], model["default_steps"], model["categories"]) == (4, 2, ["even", "odd"])
    assert {row["reasoning_steps"] for row in model["cost"]} == {0, 1, 2, 3, 4}
    assert all(row["p95_ms"] >= row["median_ms"] > 0 for row in model["cost"])


def test_what_each_number_of_steps_gains_and_costs() -> None:
    gains = [(0.003, -0.001, 0.007), (0.02, 0.015, 0.025), (0.021, 0.016, 0.026), (-0.005, -0.009, -0.001)]
    engine = ShapedEngine(Engine(tiny_model(accuracy=measured_gains(gains))))
    with TestClient(create_app(settings(), engine)) as client:
        ready(client)
        costs = client.app.state.service.costs  # type: ignore[attr-defined]
        for _ in range(WINDOW):
            costs.observe(2, 50, 0.0125, "tiny-0")
        costs.observe(2, 100, 1.0, "tiny-0")  # two searches in a batch, or a wider one
        (model,) = client.get("/models").json()["models"]
    assert [(row["reasoning_steps"], row["auto"]) for row in model["by_steps"]] == [
        (0, True), (1, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    assert model["by_steps"][2] == {
        "reasoning_steps": 2, "auto": True, "users": 2000, "of": 20000, "recall_at_10": 0.6, "ndcg_at_10": 0.42,
        "gain": 0.02, "gain_low": 0.015, "gain_high": 0.025, "detectable": 0.0071, "median_ms": 12.5,
    }  # fmt: skip
    without = model["by_steps"][0]
    assert without["gain"] is without["gain_low"] is without["detectable"] is None and without["ndcg_at_10"] == 0.4
    assert model["accuracy"] == measured_gains(gains)


def test_what_was_not_measured_is_null(client: TestClient) -> None:
    """Neither the accuracy of this old bundle, nor, as soon as nothing is remembered of it, its cost."""
    costs = client.app.state.service.costs  # type: ignore[attr-defined]
    assert all(row["median_ms"] > 0 for row in client.get("/models").json()["models"][0]["by_steps"])
    costs.forget("tiny-0")
    (model,) = client.get("/models").json()["models"]
    known = {"reasoning_steps", "auto"}
    for steps, row in enumerate(model["by_steps"]):
        assert row == {"reasoning_steps": steps, "auto": True} | dict.fromkeys(row.keys() - known)
    assert (model["accuracy"], model["cost"], len(model["by_steps"])) == ([], [], 5)


def test_more_events_than_are_kept_are_refused_in_a_sentence(start: Start) -> None:
    client = start(max_known_user_bytes=4096)
    refused = client.post("/users/u1/events", json={"items": ["x" * 250] * 20})
    assert refused.status_code == 422 and refused.json()["field"] == "items" and "4096" in refused.json()["detail"]
    assert client.post("/users/u1/events", json={"items": ["i1"]}).json()["history_length"] == 1


@pytest.mark.parametrize("processes", [{"replicas": 2}, {"workers": 2}])
def test_processes_that_share_no_redis_keep_nothing_of_users(start: Start, processes: dict[str, int]) -> None:
    """What one of them kept, an erasure at another would miss."""
    client = start(**processes)
    refused = client.post("/users/u1/events", json={"items": ["i1"]})
    assert refused.status_code == 503 and "STREAMREC_REDIS_URL" in refused.json()["detail"]
    assert [ask(client, user_id="u1", history=["i1"]).json()["cache"] for _ in range(2)] == ["off", "off"]
    assert client.get("/users/u1").status_code == 404 and client.delete("/users/u1").status_code == 204


def test_similar_items_for_the_page_of_one(client: TestClient, engine: ShapedEngine) -> None:
    body = client.get("/items/i7/similar", params={"k": 9}).json()
    assert (body["item_id"], body["model_version"], body["unknown_items"]) == ("i7", engine.bundle.version, [])
    found = [item["item_id"] for item in body["items"]]
    assert len(set(found)) == 9 and "i7" not in found
    kinds = [item["by"] for item in body["items"]]
    assert kinds == sorted(kinds, reverse=True)  # together, then content
    assert body["items"][0]["title"].startswith("Thing number")
    content = client.get("/items/i7/similar?by=content&k=100").json()["items"]
    assert len(content) == 59 and {item["by"] for item in content} == {"content"}
    denied = content[0]["item_id"]
    ruled = client.get(f"/items/i7/similar?by=content&deny={denied}&deny=x&categories=even&k=100").json()
    assert ruled["unknown_items"] == ["x"]
    assert ruled["items"] == [item for item in content if item["categories"] == ["even"] and item["item_id"] != denied]
    assert [item["item_id"] for item in client.get("/items/i7/similar?allow=i3&allow=i7").json()["items"]] == ["i3"]


def test_similar_items_that_cannot_be_had_are_problems(client: TestClient) -> None:
    missing = client.get("/items/nope/similar")
    assert missing.status_code == 404 and missing.headers["content-type"] == "application/problem+json"
    assert client.get("/items/i7/similar?catalogue=nowhere").status_code == 404
    for wrong, field in (("by=taste", "by"), ("k=0", "k"), ("k=101", "k"), ("k=1&k=2", "k"), ("x=1", "x"),
                         ("categories=none", "categories"), ("deny=", "deny.0")):  # fmt: skip
        refused = client.get(f"/items/i7/similar?{wrong}")
        assert refused.status_code == 422 and refused.json()["field"] == field, wrong


# Answers that may be kept


def test_what_still_holds_is_304_and_what_has_changed_is_sent_again(shared: TestClient) -> None:
    for path in ("/items/i1", "/items?query=number", "/items/i1/similar?k=3", "/popular"):
        first = shared.get(path)
        tag = first.headers["etag"]
        assert first.headers["cache-control"] == "private, no-cache"
        for sent in (tag, f'"other", W/{tag}'):
            again = shared.get(path, headers={"If-None-Match": sent})
            assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
        assert shared.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    tag = shared.get("/items/i9").headers["etag"]
    renamed = {"title": "Another name", "categories": ["odd"]}
    assert shared.put("/items/i9", json=renamed, headers={"X-API-Key": "admin"}).status_code == 200
    changed = shared.get("/items/i9", headers={"If-None-Match": tag})
    assert changed.status_code == 200 and changed.json()["title"] == "Another name"
    assert shared.get("/models").headers["cache-control"] == "no-store"
