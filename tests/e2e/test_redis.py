"""The started service over a real Redis: shared between replicas, and never needed for an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.answers import assert_same_answer
from tests.conftest import RedisServer, SlowRoad
from tests.e2e.conftest import ServiceProcess, StartService
from tests.waiting import DEADLINE, eventually

HISTORY = ["i1", "i2", "i3"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def road(server: RedisServer) -> Iterator[SlowRoad]:
    road = SlowRoad(server)
    yield road
    road.close()


@pytest.fixture(scope="module")
def service(start_service: StartService, road: SlowRoad) -> ServiceProcess:
    """Without a memory tier, and with the default time limit."""
    return start_service(variables={"STREAMREC_REDIS_URL": road.url, "STREAMREC_MEMORY_CACHE_USERS": "0"})


@pytest.fixture(scope="module")
def patient(start_service: StartService, server: RedisServer) -> ServiceProcess:
    """Without a memory tier, and with time: a busy machine does not always answer within the default limit."""
    return start_service(variables={"STREAMREC_MEMORY_CACHE_USERS": "0", **with_time(server)})


def with_time(server: RedisServer) -> dict[str, str]:
    return {
        "STREAMREC_REDIS_URL": server.url,
        "STREAMREC_REDIS_TIMEOUT_MS": "1000",
        "STREAMREC_REDIS_STORE_TIMEOUT_MS": "2000",
    }


def test_states_and_histories_are_shared_and_erased_by_replicas(
    patient: ServiceProcess, start_service: StartService, server: RedisServer
) -> None:
    first = patient.recommend(user_id="shared", history=HISTORY)
    assert first["cache"] == "miss"
    again = patient.recommend(user_id="shared", history=HISTORY)
    assert again["cache"] == "redis"
    assert_same_answer(again["items"], first["items"])
    patient.http.post("/users/known/events", json={"items": HISTORY}).raise_for_status()

    other = start_service(variables=with_time(server))
    assert [other.recommend(user_id="shared", history=HISTORY)["cache"] for _ in range(2)] == ["redis", "memory"]
    assert_same_answer(other.recommend(user_id="known")["items"], first["items"])

    for user in ("shared", "known"):
        assert patient.http.delete(f"/users/{user}").status_code == 204
        eventually(lambda user=user: other.http.get(f"/users/{user}").status_code == 404)  # type: ignore[misc]
    assert server.keys_of_users() == []
    assert other.stop() == 0


def test_rubbish_in_redis_costs_nothing_but_a_miss(patient: ServiceProcess, server: RedisServer) -> None:
    expected = patient.recommend(user_id="spoilt", history=HISTORY)["items"]
    with server.client() as client:
        eventually(lambda: client.keys("streamrec:states:*") != [])
        for key in client.keys("streamrec:states:*"):
            client.set(key, b"rubbish")
    answer = patient.recommend(user_id="spoilt", history=HISTORY)
    assert answer["cache"] == "miss"
    assert_same_answer(answer["items"], expected)
    assert patient.recommend(user_id="spoilt", history=HISTORY)["cache"] == "redis"
    assert patient.metric('streamrec_cache_total{result="invalid",tier="redis"}') >= 1


def test_a_redis_that_dies_midway_costs_no_answer(service: ServiceProcess, server: RedisServer) -> None:
    expected = service.recommend(user_id="steady", history=HISTORY)["items"]
    answers: list[dict[str, Any]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(service.recommend(user_id="steady", history=HISTORY))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    eventually(lambda: len(answers) > 10)
    server.kill()
    killed_at = len(answers)
    eventually(lambda: len(answers) > killed_at + 20)
    stop.set()
    for thread in asking:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert {answer["source"] for answer in answers} == {"model"} and answers[-1]["cache"] == "miss"
    for answer in answers:
        assert_same_answer(answer["items"], expected)
    assert service.http.get("/readyz").status_code == 200
    assert service.http.post("/users/steady/events", json={"items": ["i1"]}).status_code == 503
    server.start()
    eventually(lambda: service.recommend(user_id="steady", history=HISTORY)["cache"] == "redis")


def test_a_redis_that_does_not_answer_is_soon_left_alone(service: ServiceProcess, road: SlowRoad) -> None:
    body = {"user_id": "patient", "history": HISTORY}
    service.recommend(**body)
    eventually(lambda: service.recommend(**body)["cache"] == "redis")
    before = road.sent
    road.open.clear()
    answers = [service.recommend(**body) for _ in range(40)]
    asked = road.sent - before
    road.open.set()
    assert {answer["cache"] for answer in answers} == {"miss"}
    assert asked < 20, "most did not even ask: the breaker was open"
    eventually(lambda: service.recommend(**body)["cache"] == "redis")
    assert service.metric("streamrec_invalid_items_total") == 0
