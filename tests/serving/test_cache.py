"""Cached encoder states: never stale, never rubbish, and never a wait for a Redis that is slow or gone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cache import MemoryTier, RedisTier, StateCache, history_digest, pack, unpack
from serving.redis_link import RedisDown, RedisLink, connect
from serving.types import EncoderState
from tests.conftest import RedisServer

HISTORY = (3, 1, 4)
LIMIT = 0.25  # seconds: far above a healthy answer even on a busy machine


def state(seed: int = 0, rows: int = 6, width: int = 8) -> EncoderState:
    return EncoderState(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


def memory(
    users: int = 10, nbytes: int = 1 << 20, ttl: float = 60, clock: Callable[[], float] = time.monotonic
) -> MemoryTier:
    return MemoryTier(users, nbytes, ttl, clock)


class Rig:
    """A cache over a real Redis, and the count of its accesses."""

    def __init__(
        self, server: RedisServer | None, tier: MemoryTier | None, limit: float = LIMIT, pause: float = 0.3
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.client = connect(server.url) if server else None
        redis = RedisTier(RedisLink(self.client, limit, pause=pause), 60, 1 << 20) if self.client else None
        self.cache = StateCache(tier, redis, lambda tier, result: self.counts.update([(tier, result)]))

    def run(self, scenario: Callable[[StateCache], Awaitable[None]]) -> None:
        async def main() -> None:
            try:
                await scenario(self.cache)
            finally:
                if self.client:
                    await self.client.aclose()

        asyncio.run(main())


async def stored(
    cache: StateCache, user: str = "u", version: str = "v1", history: tuple[int, ...] = HISTORY, seed: int = 0
) -> None:
    cache.put(await cache.get(user, version, history), state(seed))


# Values


@given(rows=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_value_comes_back_bit_for_bit(rows: int, width: int, seed: int) -> None:
    made, digest = state(seed, rows, width), history_digest("v", HISTORY)
    found = unpack(pack(made, digest), digest)
    assert isinstance(found, EncoderState)
    np.testing.assert_array_equal(found.hidden, made.hidden)


@given(st.data())
def test_any_damaged_value_is_invalid(data: st.DataObject) -> None:
    digest = history_digest("v", HISTORY)
    value = bytearray(pack(state(rows=2, width=3), digest))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        value[place] ^= data.draw(st.integers(1, 255))
    else:
        value = value[: data.draw(st.integers(0, len(value) - 1))]
    assert unpack(bytes(value), digest) == "invalid"


@given(st.one_of(st.binary(max_size=200), st.none(), st.text(max_size=9)))
def test_rubbish_is_invalid(value: object) -> None:
    assert unpack(value, history_digest("v", HISTORY)) == "invalid"


def test_another_history_or_version_is_another_digest() -> None:
    digests = {
        history_digest(*args) for args in [("v", (1, 2)), ("v", (2, 1)), ("v", (1,)), ("w", (1, 2)), ("v", (12,))]
    }
    assert len(digests) == 5
    assert unpack(pack(state(), history_digest("v", (1, 2))), history_digest("v", (2, 1))) == "stale"


# Memory


def test_memory_answers_only_for_the_same_history() -> None:
    rig = Rig(None, memory())

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        again = await cache.get("u", "v1", HISTORY)
        assert again.source == "memory" and again.state is not None
        assert (await cache.get("u", "v2", HISTORY)).source == "miss"
        await stored(cache)
        assert (await cache.get("u", "v1", (*HISTORY, 5))).source == "miss"
        assert (await cache.get("other", "v1", HISTORY)).source == "miss"

    rig.run(scenario)
    assert rig.counts["memory", "hit"] == 1 and rig.counts["memory", "stale"] == 2


def test_memory_is_bounded_by_users_the_oldest_go_first() -> None:
    tier = memory(users=2)
    tier.put("a", b"h", state())
    tier.put("b", b"h", state())
    tier.get("a", b"h")
    tier.put("c", b"h", state())
    assert "a" in tier and "b" not in tier and "c" in tier


def test_memory_is_bounded_by_bytes_and_counts_them_right() -> None:
    one = state().nbytes
    tier = memory(nbytes=3 * one)
    for i in range(10):
        tier.put(f"u{i}", b"h", state())
        tier.put(f"u{i}", b"other", state())
        assert tier.nbytes == one * len(tier) <= 3 * one
    tier.put("wide", b"h", state(rows=1000))
    assert len(tier) == 0 and tier.nbytes == 0


def test_memory_forgets_with_time() -> None:
    now = [0.0]
    tier = memory(ttl=10, clock=lambda: now[0])
    tier.put("u", b"h", state())
    now[0] = 9
    assert isinstance(tier.get("u", b"h"), EncoderState)
    now[0] = 11
    assert tier.get("u", b"h") == "stale"


def test_with_both_tiers_off_nothing_is_kept() -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert (await cache.get("u", "v1", HISTORY)).source == "off"

    Rig(None, None).run(scenario)


# Redis


def test_redis_serves_another_process_and_fills_its_memory(redis_server: RedisServer) -> None:
    async def write(cache: StateCache) -> None:
        await stored(cache, seed=7)
        assert (await cache.get("u", "v1", HISTORY)).source == "redis"  # even right behind the write

    async def read(cache: StateCache) -> None:
        first = await cache.get("u", "v1", HISTORY)
        assert first.source == "redis" and first.state is not None
        np.testing.assert_array_equal(first.state.hidden, state(7).hidden)
        assert (await cache.get("u", "v1", HISTORY)).source == "memory"

    Rig(redis_server, None).run(write)
    Rig(redis_server, memory()).run(read)
    with redis_server.client() as client:
        assert 0 < client.ttl(client.keys("streamrec:*")[0]) <= 60


def test_redis_never_gives_a_stale_state(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert (await cache.get("u", "v1", (9, 9))).source == "miss"
        assert (await cache.get("u", "v2", HISTORY)).source == "miss"
        await stored(cache, version="v2", seed=2)  # versions live side by side
        found = [await cache.get("u", version, HISTORY) for version in ("v1", "v2")]
        assert [lookup.source for lookup in found] == ["redis", "redis"]
        assert not np.array_equal(found[0].state.hidden, found[1].state.hidden)  # type: ignore[union-attr]

    Rig(redis_server, None).run(scenario)


@pytest.mark.parametrize("rubbish", [b"", b"garbage" * 100, "wrong type"])
def test_rubbish_in_redis_is_a_counted_miss_and_is_replaced(redis_server: RedisServer, rubbish: bytes | str) -> None:
    rig = Rig(redis_server, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert (await cache.get("u", "v1", HISTORY)).source == "redis"
        with redis_server.client() as client:
            key = client.keys("streamrec:*")[0]
            if isinstance(rubbish, bytes):
                client.hset(key, "v1", rubbish)
            else:
                client.set(key, rubbish)
        assert (await cache.get("u", "v1", HISTORY)).source == "miss"
        for _ in range(2):  # the first write clears what is of another type
            await stored(cache)
        assert (await cache.get("u", "v1", HISTORY)).source == "redis"

    rig.run(scenario)
    assert rig.counts["redis", "invalid"] >= 1


def test_a_dead_redis_is_a_miss_and_soon_not_even_asked(redis_server: RedisServer) -> None:
    rig = Rig(redis_server, None, pause=0.3)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        redis_server.kill()
        started = time.monotonic()
        for _ in range(50):
            assert (await cache.get("u", "v1", HISTORY)).source == "miss"
        assert time.monotonic() - started < 4 * LIMIT
        redis_server.start()
        deadline = time.monotonic() + 5
        while (await cache.get("u", "v1", HISTORY)).source != "redis":  # it is used again, once back
            await stored(cache)
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    rig.run(scenario)
    assert rig.counts["redis", "error"] >= 50


def test_a_frozen_redis_costs_its_limit_and_then_nothing(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert (await cache.get("u", "v1", HISTORY)).source == "redis"
        redis_server.freeze()
        try:
            started = time.monotonic()
            assert (await cache.get("u", "v1", HISTORY)).source == "miss"
            assert time.monotonic() - started < 0.2 + 0.05
            for _ in range(100):
                await cache.get("u", "v1", HISTORY)
            assert time.monotonic() - started < 1.0
        finally:
            redis_server.thaw()

    Rig(redis_server, None, limit=0.05, pause=5).run(scenario)


def test_a_late_event_loop_is_not_taken_for_a_slow_redis(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        link = RedisLink(client, 0.02)
        await RedisLink(client, 1.0).call(lambda c: c.ping())
        call = asyncio.ensure_future(link.call(lambda c: c.ping()))
        for _ in range(3):
            await asyncio.sleep(0)  # the command is on its way
        time.sleep(0.1)  # the loop is held up for longer than the limit
        assert await call
        await client.aclose()

    asyncio.run(scenario())


def test_the_breaker_lets_one_call_try_after_its_pause() -> None:
    now, calls = [0.0], [0]

    async def fail(client: object) -> None:
        calls[0] += 1
        raise ConnectionError

    async def scenario() -> None:
        link = RedisLink(None, 1.0, failures=3, pause=2.0, clock=lambda: now[0])  # type: ignore[arg-type]
        for _ in range(10):
            with pytest.raises(RedisDown):
                await link.call(fail)
        assert calls[0] == 3
        now[0] = 2.5
        await asyncio.gather(*(link.call(fail) for _ in range(5)), return_exceptions=True)
        assert calls[0] == 4

    asyncio.run(scenario())


# Erasing


def test_erasing_removes_every_version_from_both_tiers(redis_server: RedisServer) -> None:
    tier = memory()

    async def scenario(cache: StateCache) -> None:
        await stored(cache, version="v1")
        await cache.get("u", "v1", HISTORY)
        await stored(cache, version="v2")
        await cache.get("u", "v2", HISTORY)
        await stored(cache, user="other")
        assert await cache.held("u") == ["memory", "redis"]
        await cache.erase("u")
        assert await cache.held("u") == []
        assert (await cache.get("other", "v1", HISTORY)).source == "memory"

    Rig(redis_server, tier).run(scenario)


def test_an_answer_in_flight_does_not_bring_an_erased_user_back(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        lookup = await cache.get("u", "v1", HISTORY)
        await cache.erase("u")
        cache.put(lookup, state())
        assert await cache.held("u") == []
        cache.put(await cache.get("u", "v1", HISTORY), state())  # its write is under way when the erasure comes
        await cache.erase("u")
        assert await cache.held("u") == []

    Rig(redis_server, memory()).run(scenario)


def test_erasing_without_redis_is_an_error_not_a_lie(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        redis_server.kill()
        with pytest.raises(RedisDown):
            await cache.erase("u")

    Rig(redis_server, memory()).run(scenario)
