"""Every error is problem details (RFC 9457) with a request id, those of the framework included."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import Start

JSON = {"content-type": "application/json"}
DEEP = "[" * 100_000

BAD: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    ("GET", "/nowhere", {}, 404, None),
    ("GET", "/page/nothing.js", {}, 404, None),
    ("POST", "/recommend/", {"json": {}}, 404, None),  # never a redirect: its address would be the client's Host
    ("POST", "/recommend/batch/", {"json": {"requests": [{}]}}, 404, None),
    ("GET", "/metrics/", {}, 404, None),
    ("GET", "/models/", {}, 404, None),
    ("GET", "/items/nothing", {}, 404, None),
    ("GET", "/recommend", {}, 405, None),
    ("DELETE", "/models", {}, 405, None),
    ("OPTIONS", "/recommend", {}, 405, None),
    ("PATCH", "/users/u", {}, 405, None),
    ("POST", "/recommend", {}, 422, None),
    ("POST", "/recommend", {"content": "{", "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": '{"k": 1}{', "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": b"\xff\xfe{}", "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": "[]", "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": '"text"', "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": "null", "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": DEEP, "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": '{"k": ' + "9" * 5000 + "}", "headers": JSON}, 422, "body"),
    ("POST", "/recommend", {"content": '{"timeout_ms": NaN}', "headers": JSON}, 422, "timeout_ms"),
    ("POST", "/recommend", {"content": '{"timeout_ms": 1e999}', "headers": JSON}, 422, "timeout_ms"),
    ("POST", "/recommend", {"content": '{"user_id": "\\ud800"}', "headers": JSON}, 422, "user_id"),
    ("POST", "/recommend", {"content": "k=1", "headers": {"content-type": "text/plain"}}, 422, "body"),
    ("POST", "/recommend", {"data": {"k": "1"}}, 422, "body"),
    ("POST", "/recommend", {"json": {"k": "10"}}, 422, "k"),
    ("POST", "/recommend", {"json": {"k": True}}, 422, "k"),
    ("POST", "/recommend", {"json": {"history": ["i1", 2]}}, 422, "history.1"),
    ("POST", "/recommend", {"json": {"history": ["x"] * 10_001}}, 422, "history"),
    ("POST", "/recommend", {"json": {"history": ["x" * 257]}}, 422, "history.0"),
    ("POST", "/recommend", {"json": {"categories": ["x"] * 101}}, 422, "categories"),
    ("POST", "/recommend", {"json": {"deny": ["x"] * 10_001}}, 422, "deny"),
    ("POST", "/recommend", {"json": {"k": 1, "steps": 2}}, 422, "steps"),
    ("POST", "/recommend", {"json": {"catalogue": "none"}}, 404, "catalogue"),
    ("POST", "/recommend?reasoning_steps=many", {"json": {}}, 422, "reasoning_steps"),
    ("POST", "/recommend?reasoning_steps=99", {"json": {}}, 422, "reasoning_steps"),
    ("POST", "/recommend?reasoning_steps=-1", {"json": {}}, 422, "reasoning_steps"),
    ("POST", "/recommend?reasoning_steps=" + "9" * 17, {"json": {}}, 422, "reasoning_steps"),
    ("POST", "/recommend/batch", {"json": {"requests": []}}, 422, "requests"),
    ("POST", "/recommend/batch", {"json": {"requests": [{}] * 129}}, 422, "requests"),
    ("POST", "/users/u/events", {"json": {"items": ["x"] * 1001}}, 422, "items"),
    ("GET", "/users/" + "x" * 257, {}, 422, "user_id"),
    ("GET", "/items?limit=0", {}, 422, "limit"),
    ("GET", "/items?limit=many", {}, 422, "limit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "field"), BAD, ids=[f"{m} {p[:40]} {str(s)[:40]}" for m, p, s, _, _ in BAD]
)
def test_an_error_is_a_problem(
    shared: TestClient, method: str, path: str, sent: dict[str, Any], status: int, field: str | None
) -> None:
    response = shared.request(method, path, **sent)
    problem = response.json()
    assert response.status_code == problem["status"] == status, response.text
    assert response.headers["content-type"] == "application/problem+json" and response.headers["x-request-id"]
    assert problem["type"].startswith("urn:streamrec:problem:") and problem["title"] and problem["detail"]
    if field is not None:
        assert problem["field"] == field
    if status == 405:
        assert response.headers["allow"] and "/docs" in problem["detail"]
    assert shared.get("/readyz").status_code == 200


def test_a_body_beyond_the_bound_is_a_problem_before_it_is_read(start: Start) -> None:
    client = start(max_body_bytes=1000)
    for path in ("/recommend", "/recommend/batch", "/users/u/events"):
        response = client.post(path, content=b" " * 1001, headers=JSON)
        assert response.status_code == 413 and response.json()["field"] == "body"
