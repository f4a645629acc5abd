"""A Redis in cluster mode, as managed ones often are: used where one node has all keys, else refused at the start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.app.conftest import ShapedEngine, Start, settings
from tests.app.test_recommend import HISTORY, ask
from tests.app.test_shared_redis import PATIENT
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually

SLOTS = 16384


@pytest.fixture(scope="module")
def node() -> Iterator[RedisServer]:
    """The only node of a cluster."""
    with ExitStack() as stack:
        server = RedisServer("--cluster-enabled", "yes")
        stack.callback(server.close)
        with server.client() as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(SLOTS))
            eventually(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        yield server


def test_everything_works_with_the_one_node_of_a_cluster(start: Start, node: RedisServer) -> None:
    client = start(redis_url=node.url, quota="1000/minute", **PATIENT)
    assert client.post("/users/u/events", json={"items": HISTORY}).json()["history_length"] == len(HISTORY)
    assert ask(client, user_id="u").json()["source"] == "model"
    eventually(lambda: client.get("/users/u").json()["cached"] == ["memory", "redis"])
    assert client.delete("/users/u").status_code == 204
    assert client.get("/users/u").status_code == 404
    with node.client() as direct:
        assert {key.split(b":")[1] for key in direct.keys("*")} == {b"quota"}


def test_a_cluster_of_several_nodes_is_refused_at_the_start_in_a_sentence(
    node: RedisServer, engine: ShapedEngine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    monkeypatch.setattr("app.lifecycle.ASK_REDIS_EVERY", 0.05)
    running = start(redis_url=node.url, **PATIENT)
    with ExitStack() as stack:
        other = RedisServer("--cluster-enabled", "yes")
        stack.callback(other.close)
        with node.client() as first, other.client() as second:
            half = range(SLOTS // 2, SLOTS)
            first.execute_command("CLUSTER DELSLOTS", *half)
            second.execute_command("CLUSTER ADDSLOTS", *half)
            first.execute_command("CLUSTER MEET", "127.0.0.1", other.port)
            eventually(lambda: first.execute_command("CLUSTER INFO")["cluster_size"] == "2")
        # A service that is running already says so.
        eventually(lambda: "several nodes" in running.get("/readyz").json().get("redis", ""))
        chosen = settings(redis_url=node.url, **PATIENT)
        client = stack.enter_context(TestClient(create_app(chosen, engine, on_failure=on_failure)))
        assert told.wait(DEADLINE)
        assert "cluster of several nodes" in str(failures[0]) and client.get("/readyz").status_code == 503
