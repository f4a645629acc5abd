"""POST /recommend and /recommend/batch over the real search."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.engine import Engine
from serving.online.diversity import choose
from serving.reference import score_all_items
from serving.types import Answer, Request, Rules
from tests.answers import assert_same_answer, assert_same_answers
from tests.app.conftest import Gate, ShapedEngine, Start
from tests.conftest import RedisServer, SlowRoad
from tests.waiting import DEADLINE, eventually

HISTORY = ["i1", "i2", "i3"]


def ask(client: TestClient, steps: object = None, **body: Any) -> Any:
    query = {} if steps is None else {"reasoning_steps": str(steps)}
    return client.post("/recommend", params=query, json=body)


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def with_ids(answer: Answer) -> list[tuple[str, float]]:
    """The engine's answer under the item ids of the tiny model."""
    return [(f"i{row}", score) for row, score in zip(answer.items, answer.scores, strict=True)]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_answer_is_the_engines(client: TestClient, engine: ShapedEngine, steps: int) -> None:
    body = ask(client, steps, history=HISTORY, k=7, beam_width=20).json()
    request = Request((1, 2, 3), 7, 20, steps, Rules(exclude=(1, 2, 3)))
    expected = engine.inner.search([request], engine.inner.encode([request.history]))[0]
    assert_same_answer(body["items"], with_ids(expected))
    assert (body["source"], body["reasoning_steps"], body["beam_width"], body["cache"]) == ("model", steps, 20, "off")
    assert body["model_version"] == engine.bundle.version and body["items"][0]["title"].startswith("Thing")
    assert set(body["timings_ms"]) == {"queue", "cache", "encode", "reason", "decode", "total"}
    assert body["timings_ms"]["total"] >= body["timings_ms"]["decode"] > 0


def test_reasoning_paths_are_the_requests_or_the_bundles(client: TestClient, engine: ShapedEngine) -> None:
    usual = ask(client, 2, history=HISTORY).json()
    assert usual["reasoning_paths"] == engine.bundle.search_settings.paths
    assert engine.searched[-1][0].paths is None and not engine.searched[-1][0].explain
    with ThreadPoolExecutor(6) as pool:
        asked = list(pool.map(lambda paths: ask(client, 2, history=HISTORY, reasoning_paths=paths), (1, 3, 8) * 2))
    for paths, answer in zip((1, 3, 8) * 2, asked, strict=True):
        request = Request((1, 2, 3), 10, 50, 2, Rules(exclude=(1, 2, 3)), paths=paths)
        expected = engine.inner.search([request], engine.inner.encode([request.history]))[0]
        assert answer.json()["reasoning_paths"] == paths
        assert_same_answer(answer.json()["items"], with_ids(expected))
    for paths in (0, 17, 1.5, "2"):
        assert ask(client, 2, history=HISTORY, reasoning_paths=paths).json()["field"] == "reasoning_paths"


def test_steps_default_to_the_bundles(client: TestClient, engine: ShapedEngine) -> None:
    assert ask(client, history=HISTORY).json()["reasoning_steps"] == engine.bundle.default_steps == 2
    assert ask(client, "auto", history=HISTORY).json()["reasoning_steps"] == 4  # there is time enough


def test_k_defaults_to_10_and_the_beam_to_50_or_k(client: TestClient) -> None:
    body = ask(client, history=HISTORY).json()
    assert len(body["items"]) == 10 and body["beam_width"] == 50
    body = ask(client, history=HISTORY, k=57).json()
    assert len(body["items"]) == 57 and body["beam_width"] == 57  # all 60 items but the three seen


def test_rules_hold_and_k_does_not_shrink(client: TestClient) -> None:
    found = ids(ask(client, history=HISTORY, k=20, categories=["even"], deny=["i0", "i4"]))
    assert len(set(found)) == 20
    assert all(int(item[1:]) % 2 == 0 for item in found) and not {"i0", "i2", "i4"} & set(found)
    assert set(ids(ask(client, history=HISTORY, k=5, allow=["i7", "i9", "i1"]))) == {"i7", "i9"}
    assert set(ids(ask(client, history=HISTORY, catalogue="small"))) == {"i0", "i4"}
    assert len(ids(ask(client, history=HISTORY, k=50))) == 50


def test_seen_items_come_back_only_if_asked_for(client: TestClient) -> None:
    every = {f"i{row}" for row in range(60)}
    assert set(ids(ask(client, history=HISTORY, k=60, beam_width=60))) == every - set(HISTORY)
    assert set(ids(ask(client, history=HISTORY, k=60, beam_width=60, exclude_seen=False))) == every
    long = [f"i{row}" for row in range(20)]  # longer than the encoder reads: all of it counts as seen
    assert not set(long) & set(ids(ask(client, history=long, k=40)))


def test_no_permitted_item_is_an_empty_answer(client: TestClient) -> None:
    assert ids(ask(client, history=HISTORY, allow=[])) == []
    assert ids(ask(client, history=HISTORY, allow=["nobody"])) == []


def test_unknown_items_are_ignored_and_reported_once(client: TestClient) -> None:
    body = ask(client, history=["x", "i1", "y"], allow=["i5", "x", "z"], deny=["i6", "w"]).json()
    assert body["unknown_items"] == ["x", "y", "w", "z"] or set(body["unknown_items"]) == {"x", "y", "z", "w"}
    assert len(body["unknown_items"]) == 4
    assert [item["item_id"] for item in body["items"]] == ["i5"] and body["source"] == "model"


@pytest.mark.parametrize("body", [{}, {"history": []}, {"user_id": "new"}, {"history": ["x", "y"]}])
def test_a_user_of_whom_nothing_is_known_gets_what_is_popular(
    client: TestClient, engine: ShapedEngine, body: dict[str, Any]
) -> None:
    answer = ask(client, 4, **body, k=5, categories=["odd"])
    assert answer.status_code == 200 and answer.json()["source"] == "popularity"
    popularity = engine.bundle.catalogue.popularity
    expected = sorted(range(1, 60, 2), key=lambda row: -popularity[row])[:5]
    assert ids(answer) == [f"i{row}" for row in expected]
    assert answer.json()["reasoning_steps"] == 0 and answer.json()["unknown_items"] == body.get("history", [])


def test_what_is_popular_keeps_the_rules(client: TestClient, engine: ShapedEngine) -> None:
    popular = ids(ask(client, k=60, beam_width=60))
    assert sorted(popular) == sorted(f"i{row}" for row in range(60))
    denied = ids(ask(client, k=58, beam_width=60, deny=popular[:2]))
    assert denied == popular[2:]
    wanted = {"i3", "i7", "i8"}
    assert ids(ask(client, k=9, allow=[*wanted, "x"])) == [item for item in popular if item in wanted]
    assert ids(ask(client, k=9, catalogue="small")) == [item for item in popular if int(item[1:]) < 5]
    assert ids(ask(client, allow=[])) == []
    assert "streamrec_fallback_total" in client.get("/metrics").text


def test_an_explanation_tells_every_step_and_every_item(client: TestClient) -> None:
    body = ask(client, 3, history=HISTORY, k=4, explain=True, dense_weight=0.5).json()
    explanation = body["explanation"]
    assert [step["step"] for step in explanation["steps"]] == [0, 1, 2, 3]
    assert explanation["steps"][0]["token"] is None and explanation["steps"][1]["token"] is not None
    assert all(step["nearest_items"] for step in explanation["steps"])
    assert explanation["dense_weight"] == 0.5
    for item, why in zip(body["items"], explanation["items"], strict=True):
        assert why["item_id"] == item["item_id"]
        assert len(why["token_log_probabilities"]) == 3 and len(why["similarity"]) == 4
    assert ask(client, 3, history=HISTORY).json()["explanation"] is None


@pytest.mark.parametrize("steps", [0, 3])
def test_an_explanation_adds_up_to_the_score_of_the_reference(
    client: TestClient, engine: ShapedEngine, steps: int
) -> None:
    body = ask(client, steps, history=HISTORY, k=4, explain=True, dense_weight=0.5, neighbours_weight=2.0).json()
    thought, why = body["explanation"]["steps"][1:], body["explanation"]["items"]
    path = tuple(step["token"] for step in thought)
    scores, log_prob = score_all_items(engine.bundle, (1, 2, 3), path, dense_weight=0.5, neighbours_weight=2.0)
    assert sum(step["log_probability"] for step in thought) == pytest.approx(log_prob, abs=1e-4)
    for item, part in zip(body["items"], why, strict=True):
        total = sum(part["token_log_probabilities"]) + 0.5 * part["dense_score"] + 2.0 * part["neighbour_score"]
        assert item["score"] == pytest.approx(total, abs=1e-4)
        assert total == pytest.approx(scores[engine.bundle.catalogue.row(item["item_id"])], abs=1e-4)
        assert len(part["similarity"]) == steps + 1


def test_an_explanation_of_a_mixture_adds_up_to_the_score_of_the_reference(
    start: Start, engine: ShapedEngine, mixed_engine: Engine
) -> None:
    engine.inner, engine.bundle = mixed_engine, mixed_engine.bundle
    body = ask(start(), 3, history=HISTORY, k=40, beam_width=60, explain=True, neighbours_weight=2.0).json()
    why, bundle = body["explanation"], mixed_engine.bundle
    path = tuple(step["token"] for step in why["steps"][1:])
    scores, _ = score_all_items(bundle, (1, 2, 3), path, neighbours_weight=2.0)
    assert 0 < why["gate"] < 1 and why["neighbours_weight"] == 2.0
    assert {item["neighbour_score"] is None for item in why["items"]} == {True, False}
    for item, part in zip(body["items"], why["items"], strict=True):
        share = 0.0 if part["neighbour_score"] is None else math.exp(part["neighbour_score"])
        network = math.exp(sum(part["token_log_probabilities"]))
        mixed = why["gate"] * network ** why["network_power"] + (1 - why["gate"]) * share ** why["memory_power"]
        assert item["score"] == pytest.approx(math.log(mixed) / why["network_power"], abs=1e-4)
        assert item["score"] == pytest.approx(scores[bundle.catalogue.row(item["item_id"])], abs=1e-4)


def test_the_weight_of_the_neighbours_is_the_requests_own(start: Start, engine: ShapedEngine) -> None:
    client = start()
    plain = ask(client, 0, history=HISTORY, k=5, explain=True).json()
    assert plain["explanation"]["neighbours_weight"] == 0  # the bundle's
    heavy = ask(client, 0, history=HISTORY, k=5, beam_width=60, exclude_seen=False, neighbours_weight=1000).json()
    known = engine.bundle.neighbours.shares([(1, 2, 3)], 6)[0].dense(60)[0]
    assert known[int(heavy["items"][0]["item_id"][1:])] == known.max()
    two = [{"history": HISTORY, "k": 5}, {"history": HISTORY, "k": 5, "neighbours_weight": 50}]
    together = client.post("/recommend/batch?reasoning_steps=0", json={"requests": two}).json()["results"]
    assert_same_answer(together[0]["items"], plain["items"])
    assert {item["item_id"] for item in together[1]["items"]} != {item["item_id"] for item in plain["items"]}


def test_a_weight_for_neighbours_that_the_model_does_not_have_is_422(start: Start, engine: ShapedEngine) -> None:
    engine.bundle = replace(engine.bundle, neighbours=None)
    client = start()
    response = ask(client, history=HISTORY, neighbours_weight=1)
    assert response.status_code == 422 and response.json()["field"] == "neighbours_weight"
    assert ask(client, history=HISTORY, neighbours_weight=0).status_code == 200


def test_a_state_is_cached_per_user_and_only_for_the_same_history(client: TestClient, engine: ShapedEngine) -> None:
    first = ask(client, 2, user_id="u", history=HISTORY).json()
    encoded = engine.encoded
    again = ask(client, 2, user_id="u", history=HISTORY).json()
    assert (first["cache"], again["cache"]) == ("miss", "memory") and engine.encoded == encoded
    assert_same_answer(again["items"], first["items"])
    assert ask(client, 4, user_id="u", history=HISTORY).json()["cache"] == "memory"  # any number of steps
    assert ask(client, 2, user_id="v", history=HISTORY).json()["cache"] == "miss"
    assert ask(client, 2, user_id="u", history=[*HISTORY, "i9"]).json()["cache"] == "miss"
    assert ask(client, 2, history=HISTORY).json()["cache"] == "off"


def test_concurrent_requests_of_one_user_encode_once(client: TestClient, engine: ShapedEngine) -> None:
    encoded = engine.encoded
    engine.before = gate = Gate()  # so that they meet
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, client, 2, user_id="u", history=HISTORY) for _ in range(12)]
        assert gate.reached.wait(DEADLINE)
        eventually(lambda: client.app.state.service.batcher.depth > 4)  # type: ignore[attr-defined]
        gate.opened.set()
        bodies = [each.result().json() for each in asked]
    assert engine.encoded == encoded + 1
    assert {body["cache"] for body in bodies} <= {"miss", "memory"}
    for body in bodies:
        assert_same_answer(body["items"], bodies[0]["items"])
    requests = [{"user_id": user, "history": HISTORY} for user in ("x", "y", "x", "x")]
    results = client.post("/recommend/batch", json={"requests": requests}).json()["results"]
    assert [result["cache"] for result in results] == ["miss"] * 4
    assert engine.encoded == encoded + 3


def test_a_batch_finds_all_its_states_in_redis(
    start: Start,
    engine: ShapedEngine,
    redis_server: RedisServer,
    slow_road: SlowRoad,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.lifecycle.ASK_REDIS_EVERY", 3600)  # what it asks would be counted as sent
    client = start(redis_url=slow_road.url, redis_timeout_ms=2000, redis_store_timeout_ms=2000, memory_cache_users=0)
    requests = [{"user_id": f"u{i}", "history": [f"i{i}", "i3"]} for i in range(16)]
    first = client.post("/recommend/batch", json={"requests": requests}).json()["results"]
    with redis_server.client() as redis:
        eventually(lambda: len(redis.keys("*")) == 16)
    before, encoded = slow_road.sent, engine.encoded
    again = client.post("/recommend/batch", json={"requests": requests}).json()["results"]
    assert {result["cache"] for result in again} == {"redis"} and slow_road.sent == before + 1
    assert engine.encoded == encoded
    assert_same_answers([found["items"] for found in again], [made["items"] for made in first])


def test_without_tiers_the_cache_is_off(start: Start) -> None:
    client = start(memory_cache_users=0)
    for _ in range(2):
        assert ask(client, user_id="u", history=HISTORY).json()["cache"] == "off"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": "ten"}, "k"),
        ({"k": 20, "beam_width": 10}, "k"),
        ({"k": 10_000}, "k"),
        ({"beam_width": 10_000}, "beam_width"),
        ({"histroy": []}, "histroy"),
        ({"history": "i1"}, "history"),
        ({"history": [1]}, "history.0"),
        ({"history": [""]}, "history.0"),
        ({"history": ["x" * 300]}, "history.0"),
        ({"history": ["i1"] * 20_000}, "history"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": "\ud800"}, "user_id"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"dense_weight": -1}, "dense_weight"),
        ({"neighbours_weight": -1}, "neighbours_weight"),
        ({"categories": ["even", "nope"]}, "categories"),
    ],
)
def test_a_body_that_does_not_fit_is_422_and_names_the_field(
    shared: TestClient, body: dict[str, Any], field: str
) -> None:
    response = shared.post("/recommend", content=json.dumps(body), headers={"content-type": "application/json"})
    problem = response.json()
    assert response.status_code == problem["status"] == 422, problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["field"] == field
    assert {"type", "title", "status", "detail"} <= problem.keys()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"null", b'{"k": \xff}', b'{"dense_weight": NaN}'])
def test_a_body_that_is_no_such_json_is_422(shared: TestClient, content: bytes) -> None:
    response = shared.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.json()["field"]


def test_a_very_deep_body_is_422(shared: TestClient) -> None:
    response = shared.post("/recommend", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert response.status_code == 422


@pytest.mark.parametrize("steps", ["5", "-1", "1.5", "many", "", "٣", "9" * 20])
def test_a_number_of_steps_the_model_does_not_take_is_422(shared: TestClient, steps: str) -> None:
    response = ask(shared, steps, history=HISTORY)
    assert response.status_code == 422 and response.json()["field"] == "reasoning_steps"


def test_an_unknown_named_catalogue_is_404(shared: TestClient) -> None:
    response = ask(shared, history=HISTORY, catalogue="nope")
    assert response.status_code == 404 and response.json()["field"] == "catalogue"


def test_an_item_that_must_not_be_there_is_withheld_and_counted(client: TestClient, engine: ShapedEngine) -> None:
    def spoil(answers: list[Answer]) -> list[Answer]:
        for answer in answers:
            answer.items[:4] = [1, 999, answer.items[4], -1]  # seen, nobody's, twice, none
        return answers

    engine.after = spoil
    found = ids(ask(client, history=HISTORY, k=10))
    assert len(found) == len(set(found)) == 6 and "i1" not in found
    assert "streamrec_invalid_items_total 4.0" in client.get("/metrics").text


def test_concurrent_answers_equal_those_asked_alone(client: TestClient, engine: ShapedEngine) -> None:
    bodies = [
        {
            "history": [f"i{i}", f"i{(7 * i) % 60}"][: 1 + i % 2],
            "k": 5 + i % 3,
            "categories": ["even"] if i % 5 == 0 else [],
        }
        for i in range(24)
    ]
    alone = [ask(client, 2, **body).json()["items"] for body in bodies]
    engine.searched.clear()
    engine.before = gate = Gate()
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, client, 2, **body) for body in bodies]
        assert gate.reached.wait(DEADLINE)
        eventually(lambda: client.app.state.service.batcher.depth > 4)  # type: ignore[attr-defined]
        gate.opened.set()
        together = [each.result().json()["items"] for each in asked]
    assert max(len(batch) for batch in engine.searched) > 1, "nothing shared a batch: this proves nothing"
    assert_same_answers(together, alone)


# Batches


def test_a_batch_gives_each_its_own_answer_or_problem(client: TestClient) -> None:
    requests = [
        {"history": HISTORY, "k": 3},
        {"history": HISTORY, "k": 0},
        {"catalogue": "nope"},
        7,
        {"user_id": "new"},
    ]
    response = client.post("/recommend/batch?reasoning_steps=2", json={"requests": requests})
    assert response.status_code == 200
    answer, bad, lost, rubbish, cold = response.json()["results"]
    assert_same_answer(answer["items"], ask(client, 2, history=HISTORY, k=3).json()["items"])
    assert bad["status"] == 422 and bad["field"] == "k"
    assert lost["status"] == 404 and lost["field"] == "catalogue"
    assert rubbish["status"] == 422
    assert cold["source"] == "popularity"


def test_a_batch_is_bounded(start: Start) -> None:
    client = start(max_batch_users=2)
    response = client.post("/recommend/batch", json={"requests": [{}] * 3})
    assert response.status_code == 422 and response.json()["field"] == "requests"
    assert client.post("/recommend/batch", json={"requests": []}).status_code == 422


def test_a_diverse_list_is_chosen_from_all_that_the_beams_find(client: TestClient, engine: ShapedEngine) -> None:
    wide = ask(client, 1, history=HISTORY, k=30, beam_width=30).json()["items"]
    rows, scores = [int(item["item_id"][1:]) for item in wide], [item["score"] for item in wide]
    body = ask(client, 1, history=HISTORY, k=8, beam_width=30, diversity=0.5, explain=True).json()
    expected = choose(engine.bundle, rows, scores, 8, 0.5, None)
    assert_same_answer([body["items"][0]], [wide[0]])
    assert [item["item_id"] for item in body["items"]] == [wide[index]["item_id"] for index in expected]
    for item, part in zip(body["items"], body["explanation"]["items"], strict=True):
        assert part["item_id"] == item["item_id"]
        assert sum(part["token_log_probabilities"]) == pytest.approx(item["score"], abs=1e-4)
    assert_same_answer(ask(client, 1, history=HISTORY, k=8, beam_width=30, diversity=0).json()["items"], wide[:8])


@pytest.mark.parametrize("body", [{"history": HISTORY}, {"user_id": "new"}])
def test_a_list_has_no_more_of_a_category_than_it_may(client: TestClient, body: dict[str, Any]) -> None:
    items = ask(client, 1, **body, k=10, max_per_category=3).json()["items"]
    assert sorted(item["categories"][0] for item in items) == ["even"] * 3 + ["odd"] * 3
    assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    whole = ask(client, 1, **body, k=50).json()["items"]
    assert items[0]["item_id"] == whole[0]["item_id"]


@pytest.mark.parametrize("body", [{"diversity": -0.1}, {"diversity": 1.1}, {"max_per_category": 0}])
def test_diversity_out_of_bounds_is_422(shared: TestClient, body: dict[str, Any]) -> None:
    refused = shared.post("/recommend", json=body)
    assert refused.status_code == 422 and refused.json()["field"] in body
