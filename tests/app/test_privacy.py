"""No user id, item of a history, search or key is in logs, metrics, traces or errors, read after a mixed run."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.app.collector import Collector
from tests.app.conftest import ShapedEngine, log_line, ready, settings
from tests.app.test_security import digest
from tests.conftest import RedisServer

MARK = "zz-hidden"
USER, ITEM, KEY, TEXT = f"{MARK}-user", f"{MARK}-item", f"{MARK}-key", f"{MARK} text"


def mixed_run(client: TestClient, engine: ShapedEngine, redis: RedisServer) -> list[str]:
    """Requests of every kind, right and wrong. Returns the bodies of those that were refused."""
    refused: list[str] = []

    def send(method: str, path: str, *, key: str = KEY, **more: object) -> None:
        response = client.request(method, path, headers={"X-API-Key": key, "X-Request-ID": "r-1"}, **more)  # type: ignore[arg-type]
        if response.status_code >= 400:
            refused.append(response.text)

    def fail() -> None:
        engine.before = lambda: None
        raise ValueError(f"cannot read {USER}")

    body = {"user_id": USER, "history": [ITEM, "i1", "i2"]}
    send("POST", f"/users/{USER}/events", json={"items": [ITEM, "i1"]})
    for extra in (
        {}, {"explain": True}, {"k": 0}, {"k": 500}, {"catalogue": TEXT}, {"categories": [TEXT]}, {"timeout_ms": 0.01},
        {"deny": [ITEM], "allow": [ITEM]}, {"history": ITEM}, {"history": [TEXT * 100]}, {"history": [{"id": ITEM}]},
        {"user_id": USER * 100}, {"user_id": {"id": USER}}, {"dense_weight": TEXT}, {"timeout_ms": TEXT},
    ):  # fmt: skip
        send("POST", "/recommend?reasoning_steps=2", json=body | extra)
    send("POST", f"/recommend?reasoning_steps={MARK}", json=body)
    send("POST", "/recommend/batch", json={"requests": [body, {"user_id": USER, "k": TEXT}, TEXT, None]})
    for raw in (f'{{"user_id": "{USER}"', f'"{USER}"', f'{{"user_id": "{USER}\\ud800"}}', f'{{"user_id": {USER}}}'):
        send("POST", "/recommend", content=raw)
    for path in (f"/users/{USER}", f"/items/{ITEM}", f"/items?query={TEXT}", f"/items?limit={MARK}", f"/{MARK}"):
        send("GET", path)
    answer = client.post("/recommend", json=body, headers={"X-API-Key": KEY}).json()
    for changed in ({}, {"item_id": ITEM}, {"event": TEXT}, {"recommendation_id": MARK}, {"value": TEXT}):
        given = {"recommendation_id": answer["recommendation_id"], "item_id": answer["items"][0]["item_id"]}
        send("POST", "/feedback", json=given | {"event": "click"} | changed)
    send("PUT", f"/users/{USER}")
    send("GET", f"/users/{USER}", key=f"{MARK}-wrong")
    engine.before = fail
    send("POST", "/recommend", json=body | {"history": ["i7"]})
    redis.kill()
    send("POST", f"/users/{USER}/events", json={"items": [ITEM]})
    send("GET", f"/users/{USER}")
    send("POST", "/recommend", json=body)
    send("DELETE", f"/users/{USER}")
    for _ in range(81):  # beyond the quota
        send("GET", f"/items/{ITEM}")
    return refused


class ServiceLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return log_line(record)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the service would write to stderr, at the level that tells most."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(ServiceLines())
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the test's client tells what it asks
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(before)


def test_nothing_of_a_client_is_told_elsewhere(
    engine: ShapedEngine, redis_server: RedisServer, written: io.StringIO
) -> None:
    collector = Collector()
    values = {"api_keys": digest(KEY), "quota": "80/hour", "redis_url": redis_server.url, "redis_timeout_ms": 2000}
    app = create_app(settings(**values, otlp_endpoint=collector.address), engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        ready(client)
        refused = mixed_run(client, engine, redis_server)
        metrics = client.get("/metrics").text
    collector.close()
    told = {
        "logs": written.getvalue(),
        "metrics": metrics,
        "traces": b"".join(collector.bodies).decode(errors="replace"),
        "errors": "\n".join(refused),
    }
    statuses = {json.loads(body)["status"] for body in refused}
    assert statuses >= {403, 404, 405, 422, 429, 500, 503, 504}
    assert "ValueError" in told["logs"] and "POST /recommend" in told["traces"] and "/users/{user_id}" in metrics
    for name, text in told.items():
        assert text, f"no {name}: this proves nothing"
        for secret in (MARK, digest(KEY)):
            at = text.find(secret)
            assert at < 0, f"{name}: {text[max(0, at - 300) : at + 100]}"
