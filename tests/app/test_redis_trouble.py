"""A Redis that is configured and cannot be used: the service answers without it, and says why it does."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from app import lifecycle
from tests.app.conftest import Start
from tests.app.test_recommend import HISTORY, ask
from tests.conftest import RedisServer
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "ASK_REDIS_EVERY", 0.02)


def trouble(client: TestClient) -> str:
    found = client.get("/readyz")
    assert found.status_code == 200 and found.json()["status"] == "ready"
    return str(found.json().get("redis", ""))


def test_a_wrong_password_or_database_is_told_and_costs_no_answer(
    start: Start, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server.client() as redis:
        redis.config_set("requirepass", "right")
    address = f"127.0.0.1:{redis_server.port}"
    for url, reason in [
        (f"redis://:wrong-one@{address}/0", "password"),
        (f"redis://{address}/0", "password"),
        (f"redis://:right@{address}/99", "database"),
    ]:
        client = start(redis_url=url)
        eventually(lambda client=client, reason=reason: reason in trouble(client))
        assert reason in caplog.text and "STREAMREC_REDIS_URL" in caplog.text
        assert ask(client, 1, user_id="u", history=HISTORY).status_code == 200
        caplog.clear()
    assert "wrong-one" not in caplog.text


def test_a_redis_that_comes_back_is_no_longer_a_trouble(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url)
    eventually(lambda: trouble(client) == "")
    redis_server.kill()
    eventually(lambda: "does not answer" in trouble(client))
    redis_server.start()
    eventually(lambda: trouble(client) == "")
