"""Scenarios: presets that operators keep, requests name, and processes share."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import scenarios
from app.scenarios import Scenarios
from serving.errors import RequestError
from tests.app.conftest import Start
from tests.app.test_recommend import HISTORY, ask, ids
from tests.app.test_security import digest, sending
from tests.conftest import RedisServer
from tests.waiting import eventually

ADMIN = sending("admin")
HOME = {"k": 5, "categories": ["even"], "reasoning_steps": 1, "max_per_category": 4, "timeout_ms": 500_000}


@pytest.fixture
def client(start: Start) -> TestClient:
    return start(admin_keys=digest("admin"))


def put(client: TestClient, name: str, preset: dict[str, Any]) -> Any:
    return client.put(f"/scenarios/{name}", json=preset, headers=ADMIN)


def test_a_scenario_presets_what_a_request_leaves_out(client: TestClient) -> None:
    assert put(client, "home", HOME).json() == {"name": "home", **HOME}
    preset = ask(client, history=HISTORY, scenario="home")
    same = ask(client, 1, history=HISTORY, k=5, categories=["even"], max_per_category=4, timeout_ms=500_000)
    assert ids(preset) == ids(same) and preset.json()["reasoning_steps"] == 1 and len(ids(preset)) == 4
    batch = client.post("/recommend/batch", json={"requests": [{"history": HISTORY, "scenario": "home"}]}).json()
    assert [item["item_id"] for item in batch["results"][0]["items"]] == ids(same)
    cold = ids(ask(client, scenario="home"))
    assert len(cold) == 4 and all(int(item[1:]) % 2 == 0 for item in cold)


def test_what_a_request_says_wins_even_where_it_is_the_default(client: TestClient) -> None:
    put(client, "home", HOME | {"exclude_seen": False, "beam_width": 20})
    said = {"k": 10, "categories": [], "max_per_category": None, "exclude_seen": True}
    answer = ask(client, 3, history=HISTORY, scenario="home", **said).json()
    assert len(answer["items"]) == 10 and (answer["reasoning_steps"], answer["beam_width"]) == (3, 20)
    assert {int(item["item_id"][1:]) % 2 for item in answer["items"]} == {0, 1}
    assert not {item["item_id"] for item in answer["items"]} & {*HISTORY}
    wide = ask(client, history=HISTORY, scenario="home", k=30)
    assert wide.status_code == 422 and wide.json()["field"] == "k"  # the beam is the scenario's
    batch = client.post("/recommend/batch", json={"requests": [{"scenario": "home", "k": 30}, {}]}).json()["results"]
    assert batch[0]["field"] == "k" and batch[1]["items"]


def test_a_scenario_may_filter(client: TestClient) -> None:
    put(client, "odd", {"filter": 'categories has "odd"', "k": 6})
    found = ids(ask(client, history=HISTORY, scenario="odd"))
    assert len(found) == 6 and all(int(item[1:]) % 2 for item in found)
    refused = put(client, "wrong", {"filter": "price <"})
    assert refused.status_code == 422 and refused.json()["field"] == "filter" and refused.json()["position"]
    boost = {"filter": 'categories has "odd"', "factor": 1000.0}
    put(client, "more odd", {"boost": [boost], "k": 4})
    boosted = client.post("/recommend", json={"history": ["i2"], "scenario": "more odd"}).json()["items"]
    assert len(boosted) == 4 and all(item["categories"] == ["odd"] for item in boosted)
    refused = put(client, "wrong", {"boost": [boost, {**boost, "filter": "price <"}]}).json()
    assert (refused["position"], refused["field"]) == (8, "boost.1.filter")


def test_pages_go_on_within_a_scenario(client: TestClient) -> None:
    put(client, "home", {"k": 4, "beam_width": 40, "reasoning_steps": 0})
    first = ask(client, history=HISTORY, scenario="home")
    second = ask(client, history=HISTORY, scenario="home", after=first.json()["recommendation_id"])
    assert [*ids(first), *ids(second)] == ids(ask(client, 0, history=HISTORY, k=8, beam_width=40))


def test_scenarios_are_listed_replaced_and_deleted(client: TestClient) -> None:
    assert client.get("/scenarios").json() == {"scenarios": []}
    put(client, "home", HOME)
    put(client, "a/b c", {"k": 3})
    put(client, "home", {"diversity": 0.5})
    assert client.get("/scenarios").json() == {
        "scenarios": [{"name": "a/b c", "k": 3}, {"name": "home", "diversity": 0.5}]
    }
    assert len(ids(ask(client, history=HISTORY, scenario="a/b c"))) == 3
    assert client.delete("/scenarios/home", headers=ADMIN).status_code == 204
    for gone in (ask(client, history=HISTORY, scenario="home"), client.delete("/scenarios/home", headers=ADMIN)):
        assert gone.status_code == 404 and gone.json()["type"].endswith("unknown-scenario")
        assert gone.json()["field"] == "scenario"


@pytest.mark.parametrize(
    ("preset", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 9, "beam_width": 8}, "k"),
        ({"user_id": "u"}, "user_id"),
        ({"history": []}, "history"),
        ({"scenario": "other"}, "scenario"),
        ({"reasoning_steps": "many"}, "reasoning_steps"),
        ({"reasoning_steps": 99}, "reasoning_steps"),  # beyond what any request may ask for
        ({"k": 500}, "k"),
        ({"beam_width": 500}, "beam_width"),
        ({"deny": ["x" * 256] * 1000}, "body"),  # more than an entry of the log may take
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_preset_is_422(shared: TestClient, preset: dict[str, Any], field: str) -> None:
    refused = put(shared, "home", preset)
    assert refused.status_code == 422 and refused.json()["field"].startswith(field)
    assert ask(shared, scenario="home").status_code == 404


def test_only_operators_change_them(client: TestClient) -> None:
    assert client.put("/scenarios/home", json=HOME).status_code in (401, 403)
    assert client.delete("/scenarios/home").status_code in (401, 403)


def test_there_are_only_so_many(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "MOST", 2)
    assert [put(client, name, {"k": 3}).status_code for name in ("a", "b", "c", "a")] == [200, 200, 422, 200]
    client.delete("/scenarios/a", headers=ADMIN)
    assert put(client, "c", {"k": 3}).status_code == 200


@pytest.mark.parametrize("kind", ["redis", "file"])
def test_processes_share_them_and_a_restart_keeps_them(
    start: Start, redis_server: RedisServer, tmp_path: Path, kind: str
) -> None:
    shared: dict[str, Any] = {"redis_url": redis_server.url} if kind == "redis" else {"state_dir": tmp_path}
    one, other = (start(admin_keys=digest("admin"), **shared) for _ in range(2))
    put(one, "home", HOME)
    eventually(lambda: ask(other, history=HISTORY, scenario="home").status_code == 200)
    later = start(**shared)
    assert ids(ask(later, history=HISTORY, scenario="home")) == ids(ask(one, history=HISTORY, scenario="home"))


def test_without_redis_scenarios_go_on_and_cannot_be_changed(start: Start, redis_server: RedisServer) -> None:
    client = start(admin_keys=digest("admin"), redis_url=redis_server.url)
    put(client, "home", HOME)
    redis_server.kill()
    assert put(client, "home", {"k": 1}).status_code == 503
    assert len(ids(ask(client, history=HISTORY, scenario="home"))) == 4


def test_one_that_was_kept_before_it_was_refused_is_kept() -> None:
    kept = Scenarios()
    assert asyncio.run(kept.apply([{"name": "wide", "preset": {"k": 500}}])) == [None] and kept.get("wide").k == 500


def test_what_a_newer_version_has_written_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    kept = Scenarios()
    entries = [
        {"name": "old", "preset": {"k": 3}},
        {"name": "new", "preset": {"k": 3, "mood": "bright"}},
        {"named": "x"},
    ]
    first, second, third = asyncio.run(kept.apply(entries))
    assert first is None and list(kept.by_name) == ["old"]
    assert isinstance(second, RequestError) and isinstance(third, RequestError)
    assert "newer version" in caplog.text
