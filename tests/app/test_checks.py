"""What is checked before a body is read, on every route alike; HEAD; and routes that cost much, asked without pause."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from app.metrics import SCRAPE_SHARE, Metrics, Scrapes
from tests.app.conftest import Start
from tests.app.test_security import digest, sending

WITH_BODY = {
    "/recommend": {"history": ["i1"]},
    "/recommend/batch": {"requests": [{"history": ["i1"]}]},
    "/rank": {"history": ["i1"], "items": ["i2"]},
    "/users/u/events": {"items": ["i1"]},
}
JSON = {"Content-Type": "application/json"}
NOT_THERE = ("/users/u", "/catalogues/changes")  # nobody knows this user, and nobody has an admin key


def routes(client: TestClient) -> Iterator[tuple[str, str, bool]]:
    """Method and path of every described route, and whether it takes a key."""
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            yield (
                method.upper(),
                path.replace("{user_id}", "u").replace("{item_id}", "i1").replace("{name}", "tiny"),
                "security" in operation,
            )


# Before the body is read


def ask_without_a_body(client: TestClient, method: str, path: str, headers: dict[str, str]) -> tuple[int, bool]:
    """The status of the answer to a head that promises a body which never comes, and whether anybody waited for it."""
    waited, status = [], 0
    raw = [(name.lower().encode(), value.encode()) for name, value in ({"Content-Length": "9"} | headers).items()]
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": raw,
             "scheme": "http", "client": ("192.0.2.1", 1), "root_path": ""}  # fmt: skip

    async def receive() -> Message:
        waited.append(status)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send)
    return status, 0 in waited


def test_every_route_checks_key_and_quota_before_it_reads_a_body(start: Start) -> None:
    client = start(api_keys=digest("good"), quota="5/hour")
    keyed = [(method, path) for method, path, has_key in routes(client) if has_key]
    assert {path for _, path in keyed} >= {*WITH_BODY, "/users/u", "/items", "/items/i1", "/models"}
    for method, path in keyed:
        assert ask_without_a_body(client, method, path, JSON) == (401, False)
        assert ask_without_a_body(client, method, path, JSON | sending("bad"))[1] is False
    for _ in range(5):
        client.post("/users/u/events", content="{{", headers=JSON | sending("good"))
    for method, path in keyed:
        assert ask_without_a_body(client, method, path, JSON | sending("good")) == (429, False)


def test_malformed_bodies_count_towards_the_quota(start: Start) -> None:
    client = start(quota=f"{2 * len(WITH_BODY)}/hour")
    statuses = [client.post(path, content="{{", headers=JSON).status_code for path in WITH_BODY for _ in range(2)]
    assert statuses == [422] * 2 * len(WITH_BODY)
    assert client.get("/models").status_code == 429


def test_a_body_is_not_read_after_what_is_wrong_with_the_head(shared: TestClient) -> None:
    for path in WITH_BODY:
        for headers, wrong, status in [
            ({"Content-Type": "text/plain"}, "", 422),
            (JSON | {"Content-Encoding": "gzip"}, "", 415),
            (JSON, "?other=1", 422),
            (JSON | {"Content-Length": str(1 << 30)}, "", 413),
        ]:
            assert ask_without_a_body(shared, "POST", path + wrong, headers) == (status, False)


def test_wrong_keys_are_limited_by_address_and_right_ones_are_not(start: Start) -> None:
    client = start(api_keys=digest("good"), quota="3/hour")
    guesses = [client.get("/models", headers=sending(f"guess {number}")) for number in range(5)]
    assert [guess.status_code for guess in guesses] == [403, 403, 403, 429, 429]
    assert int(guesses[-1].headers["retry-after"]) > 0
    assert [client.get("/models", headers=sending("good")).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_wrong_keys_are_limited_without_a_quota_too(start: Start) -> None:
    client = start(api_keys=digest("good"))
    statuses = {client.get("/models", headers=sending(f"guess {number}")).status_code for number in range(101)}
    assert statuses == {403, 429} and client.get("/models", headers=sending("good")).status_code == 200


# What a body says it is


@pytest.mark.parametrize("path", WITH_BODY)
def test_a_body_must_be_json_by_name(shared: TestClient, path: str) -> None:
    body = json.dumps(WITH_BODY[path]).encode()

    def answer(content_type: str | None, **headers: str) -> Any:
        return shared.post(
            path, content=body, headers=headers | ({"Content-Type": content_type} if content_type else {})
        )

    for good in ("application/json", "Application/Json", "application/json; charset=utf-8", " application/JSON ;x=y"):
        assert answer(good).status_code == 200
    for bad in (None, "text/plain", "text/plain;json", "text/json", "application/x-www-form-urlencoded", "json",
                "multipart/form-data; boundary=application/json", "application/jsonp"):  # fmt: skip
        refused = answer(bad)
        assert refused.status_code == 422 and "Content-Type: application/json" in refused.json()["detail"]
    assert answer("application/json", **{"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("path", WITH_BODY)
def test_a_compressed_body_is_415(shared: TestClient, path: str) -> None:
    body = gzip.compress(json.dumps(WITH_BODY[path]).encode())
    refused = shared.post(path, content=body, headers=JSON | {"Content-Encoding": "GZip"})
    assert refused.status_code == refused.json()["status"] == 415 and refused.headers["accept-encoding"] == "identity"


# Clients that leave, and ids that are none


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_service(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    client = start()
    assert ask_without_a_body(client, "POST", "/recommend", JSON)[1] is True
    assert 'streamrec_request_seconds_count{route="/recommend",status="499"} 1.0' in client.get("/metrics").text
    assert "unexpected" not in caplog.text


def test_ids_that_are_not_utf8_are_not_taken_for_one_another(shared: TestClient) -> None:
    for path in (
        "/users/%ff/events", "/users/a%fe/events", "/users/%ff%ef%bf%bd/events", "/users/%ef%bf%bd%ff/events",
        "/users/%ed%a0%80/events", "/users/\ufffd%c3/events",
    ):  # fmt: skip
        refused = shared.post(path, json=WITH_BODY["/users/u/events"])
        assert refused.status_code == 422 and "UTF-8" in refused.json()["detail"]
    assert shared.get("/users/%ff").status_code == shared.get("/items/%ff").status_code == 422
    for path in ("/users/%ff%EF%BF%BD", "/items/%ef%bf%bd%FF", "/items/%ff%ef%bf%bd/similar"):
        assert shared.get(path).status_code == 422
    for user in ("é", "\ufffd", "\ufffd\ufffd"):
        assert shared.post(f"/users/{quote(user)}/events", json=WITH_BODY["/users/u/events"]).json()["user_id"] == user


# The query


def test_a_query_that_is_not_utf8_is_refused(shared: TestClient) -> None:
    for query in ("deny=%ff", "deny=%ef%bf%bd&deny=%fe", "allow=a%ed%a0%80", "%ff=1"):
        refused = shared.get(f"/popular?{query}")
        assert refused.status_code == 422 and refused.json()["field"] == "query"
        assert "UTF-8" in refused.json()["detail"]
    for text in ("é", "\ufffd", "%ff", "a+b c"):
        found = shared.get("/popular", params={"deny": text})
        assert found.status_code == 200 and found.json()["unknown_items"] == [text]


def test_every_route_names_a_query_parameter_it_does_not_know(shared: TestClient) -> None:
    every = [(method, path) for method, path, _ in routes(shared)]
    for method, path in [*every, ("GET", "/"), ("GET", "/docs"), ("GET", "/page/style.css"), ("GET", "/openapi.json")]:
        body = {"json": WITH_BODY[path]} if path in WITH_BODY else {}
        refused = shared.request(method, path + "?reasoning_step=2", headers=sending("admin"), **body)
        assert refused.status_code == 422 and refused.json()["field"] == "reasoning_step", (method, path)
        assert "'reasoning_step'" in refused.json()["detail"]


def test_a_query_parameter_is_given_once(shared: TestClient) -> None:
    for path in ("/recommend", "/recommend/batch"):
        assert shared.post(path + "?reasoning_steps=1", json=WITH_BODY[path]).status_code == 200
        refused = shared.post(path + "?reasoning_steps=1&reasoning_steps=2", json=WITH_BODY[path])
        assert refused.status_code == 422 and refused.json()["field"] == "reasoning_steps"
    assert shared.get("/items?query=thing&limit=3").status_code == 200


def test_a_query_too_long_names_its_field(shared: TestClient) -> None:
    refused = shared.get("/items?query=" + "a" * 101)
    assert refused.status_code == 422 and refused.json()["field"] == "query"


# HEAD


def test_what_answers_get_answers_head(shared: TestClient) -> None:
    got = [path for method, path, _ in routes(shared) if method == "GET" and path not in NOT_THERE]
    for path in [*got, "/", "/docs", "/openapi.json", "/page/script.js"]:
        head, get = shared.head(path), shared.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        if path not in ("/metrics", "/models", "/catalogues", "/popular", "/trending"):  # these change
            assert head.headers["content-length"] == get.headers["content-length"]
    assert shared.head("/recommend").status_code == 405 and shared.head("/nowhere").status_code == 404


# Scrapes


def test_scrapes_share_a_rendering_that_begins_after_they_asked() -> None:
    class Slow(Metrics):
        rendered = 0

        def text(self) -> bytes:
            self.rendered += 1
            return super().text()

    metrics = Slow()

    async def go() -> None:
        scrapes = Scrapes(metrics)
        assert len({*await asyncio.gather(*(scrapes.text() for _ in range(50)))}) == 1 and metrics.rendered == 1
        metrics.rejections("here").inc()
        assert b'reason="here"' in await scrapes.text()
        loop = asyncio.get_running_loop()
        gone = asyncio.ensure_future(scrapes.text())
        stays = asyncio.ensure_future(scrapes.text())
        await asyncio.sleep(0)
        gone.cancel()
        assert b"streamrec" in await stays
        started, before = loop.time(), metrics.rendered
        while loop.time() - started < 0.3:
            await scrapes.text()
        assert metrics.rendered > before

    asyncio.run(go())


def test_scrapes_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: every rendering takes a second."""
    now, begun = 0.0, []

    class Slow(Metrics):
        def text(self) -> bytes:
            nonlocal now
            begun.append(now)
            now += 1.0
            return b""

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += max(0.0, seconds)

    monkeypatch.setattr("app.metrics.time.monotonic", lambda: now)
    monkeypatch.setattr("app.metrics.asyncio.sleep", sleep)

    async def go() -> None:
        scrapes = Scrapes(Slow())
        for _ in range(4):
            await scrapes.text()

    asyncio.run(go())
    assert begun == [pytest.approx(number / SCRAPE_SHARE) for number in range(4)]


def test_the_description_is_rendered_once(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shared.get("/openapi.json")
    monkeypatch.setattr(shared.app, "openapi", lambda: 1 / 0)
    assert shared.get("/openapi.json").content == first.content and first.json()["openapi"].startswith("3.")
