"""What users were shown and did not take: kept for its time, bounded, forgotten once taken or erased."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from serving.errors import StoreUnavailable
from serving.online import impressions
from serving.online.impressions import Impressions, LocalImpressions, RedisImpressions, lowered
from serving.online.redis_link import RedisLink, connect
from tests.conftest import RedisServer
from tests.waiting import DEADLINE

WINDOW = 100


@dataclass
class Clock:
    now: float = 1e9

    def __call__(self) -> float:
        return self.now


def in_redis(server: RedisServer, clock: Clock, work: Callable[[RedisImpressions], Awaitable[Any]]) -> None:
    async def run() -> None:
        client = connect(server.url)
        try:
            await work(RedisImpressions(RedisLink(client, DEADLINE), "p", WINDOW, clock))
        finally:
            await client.aclose()

    asyncio.run(run())


async def kept_for_their_time(store: Impressions, clock: Clock) -> None:
    await store.show("u", "i1")
    clock.now += 60
    for item in ("i2", "ü", "i3"):
        clock.now += 0.1
        await store.show("u", item)
    await store.show("v", "i1")
    assert await store.get("u") == ["i1", "i2", "ü", "i3"]
    await store.take("u", "i2")
    await store.take("u", "never shown")
    await store.take("nobody", "i2")
    clock.now += 41  # i1 was shown longer ago than the window
    assert await store.get("u") == ["ü", "i3"]
    await store.show("u", "i3")
    clock.now += 60
    assert (await store.get("u"), await store.get("v"), await store.get("nobody")) == (["i3"], [], [])
    await store.show("v", "i5")
    await store.erase("u")
    await store.erase("nobody")
    assert (await store.get("u"), await store.get("v")) == ([], ["i5"])


def test_a_process_keeps_them_for_their_time() -> None:
    clock = Clock()
    asyncio.run(kept_for_their_time(LocalImpressions(WINDOW, clock), clock))


def test_redis_keeps_them_for_their_time(redis_server: RedisServer) -> None:
    clock = Clock()
    in_redis(redis_server, clock, lambda store: kept_for_their_time(store, clock))
    with redis_server.client() as client:
        assert client.keys("*") == [b"p:shown:v"] and 0 < client.ttl("p:shown:v") <= WINDOW


async def bounded_by_user(store: Impressions, clock: Clock) -> None:
    for number in range(10):
        clock.now += 1
        await store.show("u", f"i{number}")
    assert await store.get("u") == ["i7", "i8", "i9"]


def test_the_newest_of_a_user_are_kept(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impressions, "PER_USER", 3)
    clock = Clock()
    asyncio.run(bounded_by_user(LocalImpressions(WINDOW, clock), clock))
    in_redis(redis_server, clock, lambda store: bounded_by_user(store, clock))


def test_a_process_keeps_so_many_of_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impressions, "MAX_ENTRIES", 5)

    async def work() -> None:
        store = LocalImpressions(WINDOW, Clock())
        for number in range(9):
            await store.show(f"u{number % 3}", f"i{number}")
        await store.take("u1", "i7")
        await store.show("u1", "i9")
        assert [await store.get(f"u{number}") for number in range(3)] == [["i6"], ["i1", "i4", "i9"], ["i8"]]
        assert store._entries == sum(map(len, store._shown.values())) <= 5

    asyncio.run(work())


def test_a_process_forgets_who_has_taken_all_that_was_shown() -> None:
    async def work() -> None:
        store = LocalImpressions(WINDOW, Clock())
        for number in range(100):
            await store.show(f"u{number}", "i1")
            await store.show(f"u{number}", "i2")
            await store.take(f"u{number}", "i1")
            await store.take(f"u{number}", "never shown")
            if number != 7:
                await store.take(f"u{number}", "i2")
        assert (list(store._shown), store._entries) == (["u7"], 1)
        assert await store.get("u7") == ["i2"] and await store.get("u8") == []
        await store.show("u8", "i3")
        assert await store.get("u8") == ["i3"] and store._entries == 2

    asyncio.run(work())


def test_a_redis_that_does_not_answer_or_refuses_is_said(redis_server: RedisServer) -> None:
    async def work(store: RedisImpressions) -> None:
        redis_server.fill()
        with pytest.raises(StoreUnavailable, match="make room"):
            await store.show("u", "i1")
        redis_server.kill()
        for ask in (store.get("u"), store.show("u", "i1"), store.take("u", "i1"), store.erase("u")):
            with pytest.raises(StoreUnavailable, match="did not answer"):
                await ask

    in_redis(redis_server, Clock(), work)


def test_a_rotated_item_counts_as_less_probable() -> None:
    items = ["a", "b", "c"]
    assert lowered(items, [-1.0, -2.0, -3.0], {"b"}, 0.5, are_logs=True) == pytest.approx([-1, -2.6931, -3], abs=1e-4)
    assert lowered(items, [8.0, 6.0, 0.0], {"b", "c"}, 0.75, are_logs=False) == pytest.approx([8, 1.5, 0])
    last = lowered(items, [-1.0, -2.0, -9.0], {"a", "b"}, 1.0, are_logs=True)
    assert last[2] > last[0] > last[1]
