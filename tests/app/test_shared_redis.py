"""One Redis and several services, or somebody else who writes to it: what is shared, kept apart, refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.online.tiers import HEADER, pack
from serving.types import EncoderState
from tests.answers import assert_same_answer
from tests.app.conftest import ShapedEngine, Start
from tests.app.test_recommend import HISTORY, ask
from tests.conftest import RedisServer
from tests.waiting import eventually

PATIENT = {"redis_timeout_ms": 2000, "redis_store_timeout_ms": 2000}
SECRET = "a secret of the service"


@pytest.fixture
def begin(start: Start, redis_server: RedisServer) -> Start:
    """Starts a service on the test's Redis."""
    return lambda **values: start(redis_url=redis_server.url, **PATIENT, **values)


def plant(server: RedisServer, value: float, key: bytes = b"") -> None:
    """Replaces the one state in Redis by numbers of the same shape, signed with a key."""
    with server.client() as client:
        eventually(lambda: client.keys("*:states:*"))
        (name,) = client.keys("*:states:*")
        _, history, rows, width, _ = HEADER.unpack_from(client.get(name))
        client.set(name, pack(EncoderState(np.full((rows, width), value, np.float32)), history, key))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_state_that_nobody_can_have_made_costs_a_miss(begin: Start, redis_server: RedisServer, value: float) -> None:
    client = begin(memory_cache_users=0)
    good = ask(client, user_id="u", history=HISTORY).json()
    plant(redis_server, value)
    again = ask(client, user_id="u", history=HISTORY).json()
    assert again["cache"] == "miss"
    assert_same_answer(again["items"], good["items"])


def test_with_a_secret_no_state_of_others_is_used(begin: Start, redis_server: RedisServer) -> None:
    """Zeros could be a state as far as numbers go; only the signature tells."""
    client = begin(memory_cache_users=0, user_hash_key=SECRET)
    good = ask(client, user_id="u", history=HISTORY).json()
    for key, found in ((b"", "miss"), (b"guessed", "miss"), (SECRET.encode(), "redis")):
        plant(redis_server, 0.0, key)
        answer = ask(client, user_id="u", history=HISTORY).json()
        assert answer["cache"] == found
        if found == "miss":
            assert_same_answer(answer["items"], good["items"])


def test_a_spoilt_state_fails_none_of_its_batch_mates(client: TestClient, engine: ShapedEngine) -> None:
    """Should one get past every check: the batch is repeated one by one, and the culprit fails alone."""

    def fail_together(answers: list[Any]) -> list[Any]:
        if any(request.k == 7 for request in engine.searched[-1]):
            raise RuntimeError("not finite")
        return answers

    engine.after = fail_together
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(ask, client, history=HISTORY, k=7 if i % 5 == 0 else 3) for i in range(40)]
    statuses = [call.result().status_code for call in calls]
    assert statuses == [500 if i % 5 == 0 else 200 for i in range(40)]


def test_states_of_another_runtime_are_not_used(begin: Start) -> None:
    """Numbers of an int8 network are not those of float32, and a score must be what its definition says."""
    first, second = begin(runtime="onnx-int8"), begin(runtime="onnx")
    assert [ask(first, user_id="u", history=HISTORY).json()["cache"] for _ in range(2)] == ["miss", "memory"]
    assert ask(second, user_id="u", history=HISTORY).json()["cache"] == "miss"
    third = begin(runtime="onnx")
    eventually(lambda: ask(third, user_id="u", history=HISTORY).json()["cache"] != "miss")


def test_deployments_with_prefixes_of_their_own_share_nothing(begin: Start, redis_server: RedisServer) -> None:
    one, two = (begin(redis_prefix=prefix, quota="1000/minute") for prefix in ("shop-one", "shop:two"))
    for client, items in ((one, ["i1", "i2"]), (two, ["i3"])):
        assert client.post("/users/u/events", json={"items": items}).json()["history_length"] == len(items)
        assert ask(client, user_id="u").json()["cache"] == "miss"
        eventually(lambda client=client: "redis" in client.get("/users/u").json()["cached"])  # type: ignore[misc]
    with redis_server.client() as client:
        keys = client.keys("*")
        channels = client.pubsub_channels("*")
    for prefix in (b"shop-one:", b"shop:two:"):
        own = {key.removeprefix(prefix).split(b":")[0] for key in keys if key.startswith(prefix)}
        assert own - {b"counts"} == {b"states", b"user", b"quota"}
    assert all(key.startswith((b"shop-one:", b"shop:two:")) for key in keys)
    assert {b"shop-one:erased", b"shop:two:erased"} <= set(channels)
    assert one.delete("/users/u").status_code == 204
    assert one.get("/users/u").status_code == 404
    known = {"user_id": "u", "items": ["i3"], "cached": ["memory", "redis"], "shown": [], "feedback": 0}
    assert two.get("/users/u").json() == known
