"""Every error is problem details (RFC 9457) with a request id, those of the framework included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import Start
from tests.app.test_security import sending

JSON = {"content-type": "application/json"}
DEEP = "[" * 100_000
ADMIN = sending("admin")
INTERNAL = re.compile(
    r"instance of|0x|function-|Value should have"
)  # classes, validators, and a text that is called a list

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
    ("POST", "/recommend", {"json": {"constrained-str": {}}}, 422, "constrained-str"),
    ("POST", "/recommend", {"json": {"history": [{"constrained-str": {}}]}}, 422, "history.0.item_id"),
    ("PUT", "/items/n1", {"json": {"fields": {"p": None}}}, 422, "fields.p"),
    ("PUT", "/items/n1", {"json": {"fields": {"p": ["a", 1]}}}, 422, "fields.p"),
    ("PUT", "/items/n1", {"json": {"fields": {"constrained-str": None}}}, 422, "fields.constrained-str"),
    ("PUT", "/items/n1", {"json": {"fields": {"x" * 65: 1}}}, 422, "fields." + "x" * 65),
    ("PUT", "/items/n1", {"json": {"title": "x" * 1001}}, 422, "title"),
    ("PUT", "/items/n1", {"json": []}, 422, "body"),
    ("POST", "/items", {"json": {"items": [{"item_id": "n1", "HistoryEvent": {}}]}}, 422, "items.0.HistoryEvent"),
    ("PUT", "/catalogues/c2", {"json": {}}, 422, "body"),
    ("PUT", "/catalogues/c2", {"json": []}, 422, "body"),
    ("PUT", "/catalogues/c2", {"json": {"filter": 1}}, 422, "filter"),
    ("PUT", "/catalogues/c2", {"json": {"items": ["i1", 2]}}, 422, "items.1"),
    ("PUT", "/catalogues/c2", {"json": {"items": ["i1"], "filter": "a == 1"}}, 422, "items"),
    ("PUT", "/scenarios/s1", {"json": {"reasoning_steps": "1"}}, 422, "reasoning_steps"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "field"), BAD, ids=[f"{m} {p[:40]} {str(s)[:40]}" for m, p, s, _, _ in BAD]
)
def test_an_error_is_a_problem(
    shared: TestClient, method: str, path: str, sent: dict[str, Any], status: int, field: str | None
) -> None:
    response = shared.request(method, path, **{**sent, "headers": ADMIN | sent.get("headers", {})})
    problem = response.json()
    assert response.status_code == problem["status"] == status, response.text
    assert response.headers["content-type"] == "application/problem+json" and response.headers["x-request-id"]
    assert problem["type"].startswith("urn:streamrec:problem:") and problem["title"] and problem["detail"]
    if field is not None:
        assert problem["field"] == field
    assert not INTERNAL.search(response.text)
    if status == 405:
        assert response.headers["allow"] and "/docs" in problem["detail"]
    assert shared.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/models", "GET, HEAD, POST"),
        ("/items", "GET, HEAD, POST"),
        ("/items/i1", "DELETE, GET, HEAD, PUT"),
        ("/traffic", "GET, HEAD, PUT"),
        ("/recommend", "POST"),
    ],
)
def test_a_refused_method_is_told_all_that_the_path_takes(shared: TestClient, path: str, methods: str) -> None:
    refused = shared.patch(path)
    assert refused.status_code == 405 and refused.headers["allow"] == methods


def unions(document: dict[str, Any], schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[Any]:
    """Where in a body something of several kinds may stand; 0 for every index, "p" for every name."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    if len(kinds) > 1:
        yield path
    for kind in kinds if kinds != [schema] else []:
        yield from unions(document, kind, path)
    for name, inner in schema.get("properties", {}).items():
        yield from unions(document, inner, (*path, name))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from unions(document, schema["additionalProperties"], (*path, "p"))
    if "items" in schema:
        yield from unions(document, schema["items"], (*path, 0))


def test_what_is_of_none_of_several_kinds_is_refused_at_its_field(shared: TestClient) -> None:
    document, found = shared.get("/openapi.json").json(), set()
    for route, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            for path in unions(document, body):
                name = ".".join(map(str, path)) or "body"
                found.add((route, name))
                for sent in list[Any]((None, {}, {"x": [None]}, [[]])):
                    for part in reversed(path):
                        sent = [sent] if part == 0 else {part: sent}
                    answer = shared.request(method, re.sub("{.*?}", "n1", route), json=sent, headers=ADMIN)
                    if answer.status_code == 422:
                        problem = answer.json()
                        fields = [error["field"] for error in problem.get("errors", [problem])]
                        for field in fields:
                            assert re.fullmatch(r"[a-z_]+(\.([a-z_]+|\d+))*", field), (route, sent, field)
                        assert name == "body" or any(field.startswith(name) for field in fields), (route, sent)
                        assert not INTERNAL.search(answer.text), (route, sent)
    assert found >= {
        ("/recommend", "history.0"), ("/items", "items.0.fields.p"), ("/catalogues/{name}", "body"),
        ("/scenarios/{name}", "reasoning_steps"),
    }  # fmt: skip


def test_a_body_beyond_the_bound_is_a_problem_before_it_is_read(start: Start) -> None:
    client = start(max_body_bytes=1000)
    for path in ("/recommend", "/recommend/batch", "/users/u/events"):
        response = client.post(path, content=b" " * 1001, headers=JSON)
        assert response.status_code == 413 and response.json()["field"] == "body"
