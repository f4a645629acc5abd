"""Events in place of item ids, wherever a history is taken over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from serving.engine import Engine
from serving.reference import score_all_items
from serving.types import EventData
from tests.answers import assert_same_answer
from tests.app.conftest import Start, ready, settings
from tests.app.test_recommend import HISTORY, ask
from tests.builders import GATE, tiny_model
from tests.conftest import RedisServer

VIEW = {"item_id": "i2", "type": "view"}
CART = {"item_id": "i3", "type": "cart", "value": 2, "timestamp": 1.7e9}
STORED = [{"type": None, "value": None, "timestamp": None} | VIEW, CART | {"value": 2.0}]


@pytest.fixture(scope="module")
def weighing() -> Iterator[tuple[TestClient, Engine]]:
    """A service whose model leaves views out, and lets what is in the cart count three times."""
    model = tiny_model(
        neighbours=True, neighbours_weight=1.0, gate=GATE, type_weights=(("view", 0.0), ("cart", 3.0)), seed=3
    )
    engine = Engine(model)
    with TestClient(create_app(settings(), engine), raise_server_exceptions=False) as client:
        yield ready(client), engine


def items(client: TestClient, path: str = "/recommend", **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["items"]


def test_where_no_type_has_a_weight_an_event_is_its_item(shared: TestClient) -> None:
    plain, events = ["i1", "i2", "i3"], ["i1", VIEW, CART]
    assert_same_answer(items(shared, history=events, k=6), items(shared, history=plain, k=6))
    ranked = {"items": ["i7", "i8", "i9"]}
    assert_same_answer(
        items(shared, "/rank", history=events, **ranked), items(shared, "/rank", history=plain, **ranked)
    )
    both = [{"history": events, "k": 6}, {"history": plain, "k": 6}]
    first, second = shared.post("/recommend/batch", json={"requests": both}).json()["results"]
    assert_same_answer(first["items"], second["items"])
    answer = ask(shared, history=[{"item_id": "nowhere", "type": "view"}, *plain]).json()
    assert answer["unknown_items"] == ["nowhere"]


def test_an_event_of_weight_0_is_as_if_it_had_not_happened(weighing: tuple[TestClient, Engine]) -> None:
    client, _ = weighing
    without = items(client, history=["i1"], k=59, beam_width=60)
    assert_same_answer(items(client, history=["i1", VIEW], k=59, beam_width=60), without)
    assert "i2" in {item["item_id"] for item in without}  # it was not seen either
    assert ask(client, history=[VIEW]).json()["source"] == "popularity"


def test_weights_of_types_have_the_scores_of_the_reference(weighing: tuple[TestClient, Engine]) -> None:
    client, engine = weighing
    history = ["i1", {"item_id": "unknown", "type": "cart"}, CART, VIEW, "i4"]
    found = items(client, history=history, k=57, beam_width=60, neighbours_weight=2.0, reasoning_paths=1)
    plain = items(client, history=["i1", "i3", "i4"], k=57, beam_width=60, neighbours_weight=2.0, reasoning_paths=1)
    assert [item["score"] for item in found] != [item["score"] for item in plain]
    steps = engine.bundle.default_steps
    why = client.post("/recommend", json={"history": history, "k": 1, "explain": True, "reasoning_paths": 1}).json()
    path = tuple(step["token"] for step in why["explanation"]["steps"][1:])
    assert len(path) == steps
    events = EventData(np.array([1, 3, 1], np.float32))
    scores, _ = score_all_items(engine.bundle, (1, 3, 4), path, neighbours_weight=2.0, events=events)
    for item in found:
        assert item["score"] == pytest.approx(scores[engine.bundle.catalogue.row(item["item_id"])], abs=1e-4)


@pytest.mark.parametrize("tier", ["memory", "redis"])
def test_events_are_kept_and_shown_as_they_were_sent(tier: str, start: Start, request: pytest.FixtureRequest) -> None:
    options: dict[str, Any] = {}
    if tier == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        options = {"redis_url": server.url, "redis_timeout_ms": 2000, "redis_store_timeout_ms": 2000}
    client = start(**options)
    stored = client.post("/users/u/events", json={"items": ["i1", VIEW, CART, {"item_id": "new"}]}).json()
    assert stored == {"user_id": "u", "stored": 4, "history_length": 4, "unknown_items": ["new"]}
    assert client.get("/users/u").json()["items"][:3] == ["i1", *STORED]
    assert_same_answer(items(client, user_id="u", k=6), items(client, history=HISTORY, k=6))
    assert client.delete("/users/u").status_code == 204
    assert client.get("/users/u").status_code == 404


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"type": "view"}, "item_id"),
        ({"item_id": ""}, "item_id"),
        ({"item_id": "i1", "kind": "view"}, "kind"),
        ({"item_id": "i1", "type": ""}, "type"),
        ({"item_id": "i1", "type": "x" * 65}, "type"),
        ({"item_id": "i1", "value": "9"}, "value"),
        ({"item_id": "i1", "value": True}, "value"),
        ({"item_id": "i1", "timestamp": 1.7e12}, "timestamp"),
        ({"item_id": "i1", "timestamp": "2026-01-01"}, "timestamp"),
    ],
)
@pytest.mark.parametrize("where", ["/recommend", "/rank", "/users/u/events"])
def test_an_event_that_does_not_fit_is_422_and_names_the_field(
    shared: TestClient, where: str, entry: dict[str, Any], field: str
) -> None:
    name = "items" if where.startswith("/users") else "history"
    body = {name: ["i1", entry]} | ({"items": ["i1"]} if where == "/rank" else {})
    response = shared.post(where, json=body)
    assert (response.status_code, response.json()["field"]) == (422, f"{name}.1.{field}")
    assert "errors" not in response.json()  # nothing is said of the id that it is not
