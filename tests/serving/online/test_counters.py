"""Counts decay as they are defined, in this process and in Redis, and cost bounded memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from serving.online import counters
from serving.online.counters import TAU, WINDOWS, LocalCounters, RedisCounters, Window
from serving.online.redis_link import RedisLink, connect
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually_async

HOUR, DAY = 3600.0, 86_400.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def read(local: LocalCounters, window: Window) -> dict[str, float]:
    found = asyncio.run(local.read(window))
    return dict(zip(found.ids, found.counts.tolist(), strict=True))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_count_is_the_sum_of_its_decayed_events(window: Window) -> None:
    """Against the definition, event by event, over a year."""
    clock, rng = Clock(), np.random.default_rng(0)
    local, events = LocalCounters(clock), dict[str, list[float]]()
    for time in np.sort(rng.uniform(0, 365 * DAY, 300)).tolist():
        clock.now, ids = time, [f"i{row}" for row in rng.integers(0, 5, 3)]
        local.add(ids)
        for item_id in {*ids, ""}:
            events.setdefault(item_id, []).extend([time] * (len(set(ids)) if item_id == "" else 1))
    clock.now += 0.7 * HOUR
    tau = TAU[WINDOWS.index(window)]
    expected = {item: sum(math.exp(-(clock.now - time) / tau) for time in times) for item, times in events.items()}
    found = asyncio.run(local.read(window))
    assert found.total == pytest.approx(expected.pop(""))
    assert dict(zip(found.ids, found.counts, strict=True)) == pytest.approx(expected)
    assert found.counts.tolist() == sorted(found.counts, reverse=True)


def test_the_baseline_has_the_month_without_the_window() -> None:
    clock = Clock()
    local = LocalCounters(clock)
    local.add(["old", "both"])
    clock.now += 10 * DAY
    local.add(["both", "new"])
    found = asyncio.run(local.read("hour"))
    assert dict(zip(found.ids, found.before, strict=True)) == pytest.approx(
        {"both": math.exp(-1 / 3), "new": 0, "old": math.exp(-1 / 3)}
    )
    assert (found.total, found.total_before) == pytest.approx((2, 2 * math.exp(-1 / 3)))


def test_the_items_with_the_lowest_counts_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "KEPT", 50)
    monkeypatch.setattr(counters, "READ", 20)
    local = LocalCounters(Clock())
    for _ in range(3):
        local.add([f"often{number}" for number in range(30)])
    for number in range(1000):
        local.add([f"once{number}"])
    assert len(read(local, "day")) == 20
    assert {item[:5] for item in read(local, "day")} == {"often"}
    assert len(local._rows) <= 2 * 50 + 1 and len(local._marks) < 500
    assert asyncio.run(local.read("day")).total == pytest.approx(1090)


def in_redis(server: RedisServer, work: Callable[[RedisCounters, RedisCounters], Awaitable[Any]]) -> Any:
    """Two processes that count together."""

    async def run() -> Any:
        clients = [connect(server.url) for _ in range(2)]
        try:
            return await work(*(RedisCounters(RedisLink(client, DEADLINE, pause=0.0), "p") for client in clients))
        finally:
            for client in clients:
                await client.aclose()

    return asyncio.run(run())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "FLUSH_AFTER", 0.01)
    monkeypatch.setattr(counters, "REFRESH_AFTER", 0.0)


async def counts(of: RedisCounters, window: Window = "month") -> dict[str, float]:
    found = await of.read(window)
    return {item: round(count, 2) for item, count in zip(found.ids, found.counts.tolist(), strict=True)}


@pytest.mark.usefixtures("quick")
def test_processes_count_together_in_redis(redis_server: RedisServer) -> None:
    async def work(one: RedisCounters, other: RedisCounters) -> None:
        assert await counts(one) == {} and (await one.read("hour")).total == 0
        for _ in range(3):
            one.add(["i1", "ü", "i1"])
        other.add(["i1", "i2"])

        async def is_counted() -> bool:
            return await counts(one) == {"i1": 4, "ü": 3, "i2": 1}

        await eventually_async(is_counted)
        found = await other.read("day")
        assert found.total == pytest.approx(8, abs=0.1) and found.ids[0] == "i1"
        await one.close()
        await other.close()

    in_redis(redis_server, work)


@pytest.mark.usefixtures("quick")
def test_redis_decays_like_a_process(redis_server: RedisServer) -> None:
    async def work(one: RedisCounters, _: RedisCounters) -> None:
        with redis_server.client() as client:
            seconds, micros = client.time()
            for window, tau in zip(WINDOWS, TAU.tolist(), strict=True):
                for item in ("", "i1"):
                    client.zadd(f"p:counts:{window}", {item: seconds + micros / 1e6 - HOUR})  # one event, then
                client.zadd(f"p:counts:{window}", {"gone": seconds - 11 * tau})
        one.add(["i1"])
        await one.close()  # sends what is left
        for window, tau in zip(WINDOWS, TAU.tolist(), strict=True):
            found = await one.read(window)
            assert found.ids == ["i1"]
            assert found.counts[0] == pytest.approx(1 + math.exp(-HOUR / tau), abs=0.1)
            with redis_server.client() as client:
                assert 9 * tau < client.ttl(f"p:counts:{window}") <= 10 * tau

    in_redis(redis_server, work)


@pytest.mark.usefixtures("quick")
def test_the_items_with_the_lowest_counts_make_room_in_redis(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "KEPT", 20)
    monkeypatch.setattr(counters, "READ", 5)
    monkeypatch.setattr(counters, "SENT", 7)

    async def work(one: RedisCounters, _: RedisCounters) -> None:
        for _ in range(2):
            one.add(["often1", "often2"])
        one.add([f"once{number}" for number in range(100)])
        await one.close()
        found = await one.read("day")
        assert list(found.ids[:2]) in (["often1", "often2"], ["often2", "often1"]) and len(found.ids) == 5
        assert found.total == pytest.approx(104, abs=0.5)
        with redis_server.client() as client:
            assert client.zcard("p:counts:day") == 21

    in_redis(redis_server, work)


@pytest.mark.usefixtures("quick")
def test_events_wait_for_a_redis_that_is_away_and_reads_have_the_last_counts(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(one: RedisCounters, _: RedisCounters) -> None:
        one.add(["i1"])
        await one.close()
        assert await counts(one) == {"i1": 1}
        redis_server.kill()
        one.add(["i2"])
        assert await counts(one) == {"i1": 1}
        redis_server.start()  # empty

        async def is_counted() -> bool:
            return await counts(one) == {"i2": 1}

        await eventually_async(is_counted)
        monkeypatch.setattr(counters, "MAX_PENDING", 2)
        redis_server.fill()
        one.add(["i3", "i4"])
        one.add(["i5"])  # there is no room for what cannot be sent
        await one.close()
        redis_server.make_room()
        await one.close()
        assert await counts(one) == {"i2": 1, "i3": 1, "i4": 1}

    in_redis(redis_server, work)


@pytest.mark.usefixtures("quick")
def test_something_else_under_its_key_is_no_count(redis_server: RedisServer) -> None:
    async def work(one: RedisCounters, _: RedisCounters) -> None:
        with redis_server.client() as client:
            client.zadd("p:counts:day", {b"\xff": 1e12})
            client.set("p:counts:hour", "x")
        assert await counts(one, "day") == {} and await counts(one, "hour") == {}

    in_redis(redis_server, work)
