"""Quotas: who is counted, where, by which clock, and what comes of a Redis that fails."""

from __future__ import annotations

import asyncio
import random

import pytest
from limits import parse
from pydantic import ValidationError
from redis import Redis

from app.errors import QuotaExceeded
from app.quotas import SLICES, LocalCounts, Quotas
from app.settings import Settings
from tests.app.conftest import Start, settings
from tests.app.test_recommend import HISTORY, ask
from tests.app.test_security import digest, sending
from tests.conftest import RedisServer, SlowRoad
from tests.waiting import eventually


def test_a_client_over_its_quota_is_429_and_others_are_not(start: Start) -> None:
    client = start(api_keys=f"{digest('one')},{digest('two')}", quota="3/hour")
    body = {"history": HISTORY}
    statuses = [client.post("/recommend", json=body, headers=sending("one")).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    refused = client.get("/items", headers=sending("one"))
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["type"].endswith("over-quota") and "3 per 1 hour" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 3600 and refused.json()["retry_after"] >= 1
    assert client.post("/recommend", json=body, headers=sending("two")).status_code == 200
    assert client.get("/models", headers=sending("wrong")).status_code == 403  # and counts for nobody
    assert client.get("/readyz").status_code == client.get("/").status_code == 200
    assert 'streamrec_rejected_total{reason="over_quota"} 3.0' in client.get("/metrics").text


def test_a_batch_counts_as_many_as_it_holds(start: Start) -> None:
    client = start(quota="10/hour")
    batch = {"requests": [{"history": HISTORY}] * 8}
    assert client.post("/recommend/batch", json=batch).status_code == 200
    assert client.post("/recommend/batch", json=batch).status_code == 429
    assert ask(client, history=HISTORY).status_code == 200


def test_a_quota_comes_back(start: Start) -> None:
    client = start(quota="2/3 second;100/hour")
    assert [client.get("/models").status_code for _ in range(3)] == [200, 200, 429]
    eventually(lambda: client.get("/models").status_code == 200)


def test_replicas_share_a_quota_in_redis_and_no_key_can_be_read_there(start: Start, redis_server: RedisServer) -> None:
    shared = {"redis_url": redis_server.url, "redis_timeout_ms": 2000, "api_keys": digest("one"), "quota": "4/hour"}
    first, second = start(**shared), start(**shared)
    statuses = [client.get("/models", headers=sending("one")).status_code for client in (first, second) * 3]
    assert statuses == [200] * 4 + [429] * 2
    with redis_server.client() as redis:
        keys = b" ".join(redis.keys("*"))
        assert b"streamrec:quota" in keys and digest("one").encode() not in keys
        assert all(0 < redis.ttl(key) <= 7200 for key in redis.keys("*"))


def test_a_redis_outage_costs_three_waits_and_quotas_go_on_in_process(
    start: Start, redis_server: RedisServer, slow_road: SlowRoad
) -> None:
    client = start(redis_url=slow_road.url, redis_timeout_ms=500, quota="30/hour")
    assert client.get("/models").status_code == 200
    before = slow_road.sent
    slow_road.open.clear()
    statuses = [client.get("/models").status_code for _ in range(31)]
    assert statuses == [200] * 30 + [429]  # a count of its own, from the outage on
    assert slow_road.sent - before < 15, "after three failures it asks every two seconds at most, not 31 times"
    slow_road.open.set()
    redis_server.kill()
    assert client.get("/models").status_code == 429


def test_a_full_redis_refuses_nobody(start: Start, redis_server: RedisServer) -> None:
    with redis_server.client() as redis:
        redis.config_set("maxmemory", 1)
        redis.config_set("maxmemory-policy", "noeviction")
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, quota="5/hour")
    assert [client.get("/models").status_code for _ in range(6)] == [200] * 5 + [429]


def test_a_batch_larger_than_the_quota_is_refused_for_good(start: Start) -> None:
    client = start(quota="10/hour;100/day")
    refused = client.post("/recommend/batch", json={"requests": [{"history": HISTORY}] * 11})
    assert refused.status_code == 422 and refused.json()["field"] == "requests" and "10" in refused.json()["detail"]
    assert "retry-after" not in refused.headers


def test_a_quota_of_work_counts_rows_and_steps_and_not_requests(start: Start) -> None:
    client = start(work_quota="100/hour")

    def status(steps: int, **body: object) -> int:
        return ask(client, steps, history=HISTORY, **body).status_code

    assert [status(0, k=2, beam_width=10) for _ in range(2)] == [200, 200]  # 20 of 100
    assert status(3, k=2, beam_width=15) == 200  # 80
    assert status(0, k=2, beam_width=21) == 429
    assert client.get("/models").status_code == 200 and status(0, k=2, beam_width=20) == 200
    refused = ask(client, 1, history=HISTORY, k=2, beam_width=51)
    assert refused.status_code == 422 and refused.json()["field"] == "beam_width"


def test_a_batch_is_charged_for_the_work_of_each_of_its_requests(start: Start) -> None:
    client = start(work_quota="100/hour")
    batch = {"requests": [{"history": HISTORY, "k": 1, "beam_width": width} for width in (60, 30, 30, 10)]}
    results = client.post("/recommend/batch?reasoning_steps=0", json=batch).json()["results"]
    assert [result.get("status", 200) for result in results] == [200, 200, 429, 200]


def test_a_redis_on_a_unix_socket_keeps_a_quota(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=f"unix://{redis_server.socket}?db=0", redis_timeout_ms=2000, quota="2/hour")
    assert [client.get("/models").status_code for _ in range(3)] == [200, 200, 429]
    with redis_server.client() as redis:
        assert any(key.startswith(b"streamrec:quota") for key in redis.keys("*"))


# Counts in process


class Clock:
    def __init__(self) -> None:
        self.now = 1007.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("cost", [1, 3])
def test_what_is_refused_is_permitted_after_just_the_wait_that_was_named(cost: int) -> None:
    clock, limit = Clock(), parse("5/minute")
    counts = LocalCounts(clock)
    for _ in range(50):
        wait = counts.hit(limit, "a", cost)
        while wait is None:
            clock.now += 0.7
            wait = counts.hit(limit, "a", cost)
        assert 0 < wait <= 60
        clock.now += wait - 1e-3
        assert counts.hit(limit, "a", cost) is not None
        clock.now += 2e-3
        assert counts.hit(limit, "a", cost) is None


def test_no_window_holds_more_than_the_quota_and_an_hour_nearly_all_of_it() -> None:
    clock, limit = Clock(), parse("100/minute")
    counts, permitted = LocalCounts(clock), []
    for _ in range(36_000):
        clock.now += 0.1
        if counts.hit(limit, "a", 1) is None:
            permitted.append(clock.now)
    assert all(after - at > 59.99 for at, after in zip(permitted, permitted[100:], strict=False))
    assert 0.96 * 6000 <= len(permitted) <= 6000
    assert len(counts._counts[limit, "a"]) <= SLICES + 1


def test_clients_and_limits_are_counted_apart_and_forgotten_after_a_window() -> None:
    clock, minute, hour = Clock(), parse("1/minute"), parse("2/hour")
    counts = LocalCounts(clock)
    assert counts.hit(minute, "a", 1) is None and counts.hit(minute, "b", 1) is None
    assert counts.hit(hour, "a", 2) is None and counts.hit(minute, "a", 1) is not None
    clock.now += 60
    assert counts.hit(minute, "a", 1) is None and counts.hit(hour, "a", 1) is not None


# Counts in Redis


def pass_in_redis(redis: Redis, seconds: float) -> None:
    """Brings the end of every window nearer, as if so much time had passed."""
    for key in redis.keys("*"):
        redis.pexpire(key, round(redis.pttl(key) - 1000 * seconds))


def test_a_wait_named_by_redis_is_long_enough_and_no_longer(redis_server: RedisServer) -> None:
    """Requests and batches of several sizes, at various distances."""
    draw = random.Random(0)

    async def go(redis: Redis) -> None:
        quotas = Quotas(settings(redis_url=redis_server.url, redis_timeout_ms=5000, quota="10/hour"))
        for _ in range(40):
            with pytest.raises(QuotaExceeded) as refused:
                while True:
                    cost = draw.randint(1, 6)
                    await quotas.take("a", cost)
                    pass_in_redis(redis, draw.uniform(0, 1000))
            pass_in_redis(redis, refused.value.retry_after - 5)
            with pytest.raises(QuotaExceeded):
                await quotas.take("a", cost)
            pass_in_redis(redis, 6)
            await quotas.take("a", cost)
        await quotas.close()

    with redis_server.client() as redis:
        asyncio.run(go(redis))


# Settings


@pytest.mark.parametrize(
    "url",
    ["redis//:hunter2@host", "http://:hunter2@host", "redis://:hun/ter2@host", "redis://:77#hunter2@host",
     "redis://user:77/hunter2@host", "redis://:hunter2@host:port", "redis://:hunter2@host/first", "unix://"],
)  # fmt: skip
def test_an_address_that_names_no_redis_is_refused_without_a_part_of_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMREC_REDIS_URL", url)
    with pytest.raises(ValidationError) as refused:
        Settings()
    (error,) = refused.value.errors()
    assert error["loc"] == ("redis_url",) and "give an address like redis://" in error["msg"]
    assert not any(part in error["msg"] for part in ("hun", "77", "ter2"))


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://:p@h:1/2", "rediss://u:p%2Fq@h", "redis://[::1]:6379", "unix:///a/b.sock?db=1"]
)
def test_an_address_of_a_redis_is_taken(url: str) -> None:
    assert settings(redis_url=url).redis_url is not None
