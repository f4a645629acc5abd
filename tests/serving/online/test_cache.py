"""Cached encoder states over a real Redis: never stale, never rubbish, never a wait for a Redis that is slow or gone,
made once for all who want them, and erased in every process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from serving.online.cache import Lookup, StateCache
from serving.online.redis_link import RedisDown, connect
from serving.online.tiers import SLOTS, MemoryTier, RedisTier
from serving.types import EncoderState
from tests.conftest import RedisServer, SlowRoad
from tests.serving.online.links import FAILURES, PAUSE, Clock, CountedLink
from tests.serving.online.test_tiers import HISTORY, memory, state
from tests.waiting import eventually_async as eventually

LIMIT = 20.0  # seconds: far above a healthy answer, even on a busy machine
MAX_VALUE = 1 << 16


class Rig:
    """A cache over a Redis, the count of its accesses, and the clock of its breakers."""

    def __init__(self, url: str | None, tier: MemoryTier | None) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.client = connect(url) if url else None
        self.clock = Clock()
        redis = None
        if self.client:
            self.fast, patient = (CountedLink(self.client, LIMIT, clock=self.clock) for _ in range(2))
            redis = RedisTier(self.fast, patient, 60, MAX_VALUE)
        self.cache = StateCache(tier, redis, lambda tier, result: self.counts.update([(tier, result)]))

    async def __aenter__(self) -> StateCache:
        await self.cache.start()
        if self.client:
            await eventually(lambda: self.cache.erasures > 0)  # the channel is open
        return self.cache

    async def __aexit__(self, *error: object) -> None:
        await self.cache.close()
        if self.client:
            await self.client.aclose()

    def run(self, scenario: Callable[[StateCache], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self as cache:
                await scenario(cache)

        asyncio.run(main())


def keep(cache: StateCache, lookup: Lookup, seed: int = 0, **shape: int) -> None:
    """What the engine does with a miss, and the service with what it gave."""
    lookup.flight.state = lookup.flight.state or state(seed, **shape)
    cache.put(lookup)


async def stored(
    cache: StateCache, user: str = "u", version: str = "v1", history: tuple[int, ...] = HISTORY, seed: int = 0
) -> None:
    """Asked for, made where it was missed, and written."""
    keep(cache, await cache.get(user, version, history), seed)
    await cache.flush()


async def source(cache: StateCache, user: str = "u", version: str = "v1", history: tuple[int, ...] = HISTORY) -> str:
    return (await cache.get(user, version, history)).source


# What is found


def test_memory_answers_only_for_the_same_history() -> None:
    rig = Rig(None, memory())

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        again = await cache.get("u", "v1", HISTORY)
        assert again.source == "memory" and again.flight.state is not None
        assert await source(cache, version="v2") == "miss"
        await stored(cache)
        assert await source(cache, history=(*HISTORY, 5)) == "miss"
        assert await source(cache, user="other") == "miss"

    rig.run(scenario)
    assert rig.counts["memory", "hit"] == 1 and rig.counts["memory", "stale"] == 2


def test_with_both_tiers_off_nothing_is_kept() -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert await source(cache) == "off"

    Rig(None, None).run(scenario)


def test_redis_serves_another_process_and_fills_its_memory(redis_server: RedisServer) -> None:
    async def write(cache: StateCache) -> None:
        await stored(cache, seed=7)

    async def read(cache: StateCache) -> None:
        first = await cache.get("u", "v1", HISTORY)
        assert first.source == "redis" and first.flight.state is not None
        np.testing.assert_array_equal(first.flight.state.hidden, state(7).hidden)  # bit for bit
        assert await source(cache) == "memory"

    Rig(redis_server.url, None).run(write)
    Rig(redis_server.url, memory()).run(read)
    with redis_server.client() as client:
        assert 0 < client.ttl(client.keys("streamrec:*")[0]) <= 60


def test_redis_never_gives_a_stale_state(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert await source(cache, history=(9, 9)) == "miss"
        assert await source(cache, version="v2") == "miss"
        await stored(cache, version="v2", seed=2)  # versions live side by side
        found = [await cache.get("u", version, HISTORY) for version in ("v1", "v2")]
        assert [lookup.source for lookup in found] == ["redis", "redis"]
        assert not np.array_equal(found[0].flight.state.hidden, found[1].flight.state.hidden)  # type: ignore[union-attr]

    Rig(redis_server.url, None).run(scenario)


def test_many_versions_leave_a_bounded_number_of_values(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        for number in range(60):
            await stored(cache, version=f"v{number}")
            assert await source(cache, version=f"v{number}") == "redis"
        with redis_server.client() as client:
            assert len(client.keys("*")) <= SLOTS
            await cache.erase("u")
            assert client.keys("*") == []

    Rig(redis_server.url, None).run(scenario)


# Made once


def test_concurrent_requests_of_one_history_share_what_one_of_them_makes() -> None:
    tier = memory()

    async def scenario(cache: StateCache) -> None:
        first, second, other = [await cache.get("u", "v1", history) for history in (HISTORY, HISTORY, (1,))]
        assert first.flight is second.flight and first.flight is not other.flight
        assert (await cache.get("v", "v1", HISTORY)).flight is not first.flight
        keep(cache, first, seed=3)
        assert second.flight.state is not None
        cache.put(second)
        assert await source(cache) == "memory"

    Rig(None, tier).run(scenario)


def test_what_several_requests_share_is_written_once(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        first, second = [await cache.get("u", "v1", HISTORY) for _ in range(2)]
        for lookup in (first, second):
            keep(cache, lookup)
            await cache.flush()
        assert redis_server.calls("set") == 1
        hit = await cache.get("u", "v1", HISTORY)
        cache.put(hit)  # what was found is not written again
        await cache.flush()
        assert hit.source == "redis" and redis_server.calls("set") == 1

    Rig(redis_server.url, None).run(scenario)


def test_a_request_that_fails_leaves_the_state_to_be_made_by_the_next() -> None:
    async def scenario(cache: StateCache) -> None:
        await cache.get("u", "v1", HISTORY)  # and is never answered
        lookup = await cache.get("u", "v1", HISTORY)
        assert lookup.source == "miss" and lookup.flight.state is None
        assert len(cache._flights) == 1
        del lookup
        assert len(cache._flights) == 0  # nothing is left of those that are over

    Rig(None, memory()).run(scenario)


# One round trip


def test_a_whole_batch_is_one_round_trip(redis_server: RedisServer, slow_road: SlowRoad) -> None:
    async def scenario(cache: StateCache) -> None:
        for i in range(16):
            await stored(cache, user=f"u{i}", seed=i)
        before = slow_road.sent
        found = await asyncio.gather(*(cache.get(f"u{i}", "v1", HISTORY) for i in range(16)))
        assert {lookup.source for lookup in found} == {"redis"} and slow_road.sent == before + 1
        for i, lookup in enumerate(found):
            np.testing.assert_array_equal(lookup.flight.state.hidden, state(i).hidden)  # type: ignore[union-attr]

    Rig(slow_road.url, None).run(scenario)


def test_the_writes_of_a_batch_are_one_round_trip(redis_server: RedisServer, slow_road: SlowRoad) -> None:
    async def scenario(cache: StateCache) -> None:
        lookups = await asyncio.gather(*(cache.get(f"u{i}", "v1", HISTORY) for i in range(16)))
        before = slow_road.sent
        for lookup in lookups:
            keep(cache, lookup)
        await cache.flush()
        assert slow_road.sent == before + 1

    Rig(slow_road.url, None).run(scenario)


# A Redis that is not well


@pytest.mark.parametrize("rubbish", ["garbage", "list", "hash", "huge"])
def test_rubbish_in_redis_is_a_counted_miss_and_is_replaced(redis_server: RedisServer, rubbish: str) -> None:
    rig = Rig(redis_server.url, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert await source(cache) == "redis"
        with redis_server.client() as client:
            (key,) = client.keys("streamrec:*")
            client.delete(key)
            match rubbish:
                case "garbage":
                    client.set(key, b"garbage" * 100)
                case "list":
                    client.rpush(key, b"x")
                case "hash":
                    client.hset(key, "v1", b"x")
                case "huge":
                    client.set(key, b"x" * (64 << 20))
            sent = client.info("stats")["total_net_output_bytes"]
            assert await source(cache) == "miss"
            assert client.info("stats")["total_net_output_bytes"] - sent < 2 * MAX_VALUE  # a huge value stays there
        await stored(cache)
        assert await source(cache) == "redis"

    rig.run(scenario)
    assert rig.counts["redis", "invalid"] >= 1 and rig.counts["redis", "error"] == 0


def test_a_state_that_the_model_cannot_have_made_is_a_counted_miss_in_either_tier(redis_server: RedisServer) -> None:
    def fits(found: EncoderState) -> bool:
        return bool(np.isfinite(found.hidden).all())

    async def scenario(cache: StateCache) -> None:
        spoilt = await cache.get("u", "v1", HISTORY)
        spoilt.flight.state = EncoderState(np.full((6, 8), np.nan, np.float32))
        cache.put(spoilt)
        await cache.flush()
        del spoilt
        lookup = await cache.get("u", "v1", HISTORY, fits=fits)
        assert lookup.source == "miss" and lookup.flight.state is None
        keep(cache, lookup)
        await cache.flush()
        assert (await cache.get("u", "v1", HISTORY, fits=fits)).source == "memory"
        async with Rig(redis_server.url, None) as other:
            assert (await other.get("u", "v1", HISTORY, fits=fits)).source == "redis"

    rig = Rig(redis_server.url, memory())
    rig.run(scenario)
    assert rig.counts["memory", "invalid"] == rig.counts["redis", "invalid"] == 1


def test_a_state_above_the_bound_is_not_sent(redis_server: RedisServer) -> None:
    rig = Rig(redis_server.url, memory())

    async def scenario(cache: StateCache) -> None:
        keep(cache, await cache.get("u", "v1", HISTORY), rows=MAX_VALUE // 32, width=8)
        await cache.flush()
        assert await source(cache) == "memory"

    rig.run(scenario)
    assert rig.counts["redis", "too_large"] == 1
    with redis_server.client() as client:
        assert client.keys("*") == []


def test_a_full_redis_takes_nothing_and_still_gives(redis_server: RedisServer) -> None:
    rig = Rig(redis_server.url, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache, user="early")
        redis_server.fill()
        for _ in range(5):
            await stored(cache, user="late")
            assert await source(cache, user="late") == "miss"
        assert await source(cache, user="early") == "redis"
        await cache.erase("early")
        assert await source(cache, user="early") == "miss"
        redis_server.make_room()
        await stored(cache, user="late")
        assert await source(cache, user="late") == "redis"

    rig.run(scenario)
    assert rig.counts["redis", "write_error"] == 5 and rig.counts["redis", "error"] == 0


def test_a_dead_redis_is_a_miss_soon_not_even_asked_and_used_again_when_it_is_back(redis_server: RedisServer) -> None:
    rig = Rig(redis_server.url, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        redis_server.kill()
        before = rig.fast.sent
        for _ in range(50):
            assert await source(cache) == "miss"
        assert rig.fast.sent == before + FAILURES
        redis_server.start()
        assert await source(cache) == "miss" and rig.fast.sent == before + FAILURES  # the pause is not over

        async def hit() -> bool:
            rig.clock.now += PAUSE
            await stored(cache)
            return await source(cache) == "redis"

        await eventually(hit)

    rig.run(scenario)
    assert rig.counts["redis", "error"] >= 50


def test_a_stalled_redis_costs_its_limit_then_nothing_and_is_used_again(redis_server: RedisServer) -> None:
    rig = Rig(redis_server.url, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        before, rig.fast.limit = rig.fast.sent, 0.05
        redis_server.freeze()
        try:
            assert [await source(cache) for _ in range(100)] == ["miss"] * 100
        finally:
            redis_server.thaw()
        assert rig.fast.sent == before + FAILURES, "the breaker makes the others free"
        rig.fast.limit = LIMIT

        async def hit() -> bool:
            rig.clock.now += PAUSE
            return await source(cache) == "redis"

        await eventually(hit)

    rig.run(scenario)


def test_a_slow_redis_costs_its_limit_then_nothing_and_is_used_again(
    redis_server: RedisServer, slow_road: SlowRoad
) -> None:
    rig = Rig(slow_road.url, None)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        slow_road.delay = 0.01
        assert await source(cache) == "redis"  # slow, but not too slow
        before, rig.fast.limit = rig.fast.sent, 0.05
        slow_road.open.clear()
        assert [await source(cache) for _ in range(100)] == ["miss"] * 100
        assert rig.fast.sent == before + FAILURES
        slow_road.open.set()
        rig.fast.limit = LIMIT

        async def hit() -> bool:
            rig.clock.now += PAUSE
            return await source(cache) == "redis"

        await eventually(hit)

    rig.run(scenario)


def test_writing_to_a_stalled_redis_is_bounded(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.online.cache.MAX_PENDING_WRITES", 20)

    rig = Rig(redis_server.url, None)

    async def scenario(cache: StateCache) -> None:
        rig.fast.limit = 0.02
        redis_server.freeze()
        try:
            for i in range(200):
                keep(cache, await cache.get(f"u{i}", "v1", HISTORY))
                assert cache.pending_writes <= 20
        finally:
            redis_server.thaw()

    rig.run(scenario)


# Erasing


def test_erasing_removes_every_version_from_both_tiers(redis_server: RedisServer) -> None:
    tier = memory()

    async def scenario(cache: StateCache) -> None:
        for version in ("v1", "v2", "v3"):
            await stored(cache, version=version)
        await stored(cache, user="other")
        assert await cache.held("u") == ["memory", "redis"]
        await cache.erase("u")
        assert await cache.held("u") == []
        assert await source(cache, user="other") == "memory"

    Rig(redis_server.url, tier).run(scenario)
    with redis_server.client() as client:
        (left,) = client.keys("*")
        assert b"other" in left


def test_an_answer_in_flight_does_not_bring_an_erased_user_back(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        lookup = await cache.get("u", "v1", HISTORY)
        await cache.erase("u")
        keep(cache, lookup)
        assert await cache.held("u") == []
        keep(cache, await cache.get("u", "v1", HISTORY))  # its write is under way when the erasure comes
        await cache.erase("u")
        assert await cache.held("u") == []
        before = cache.erasures  # a request that read the known history before it was erased, and looks up after
        await cache.erase("u")
        keep(cache, await cache.get("u", "v1", HISTORY, before))
        assert await cache.held("u") == []
        assert (await cache.get("u", "v1", HISTORY)).flight.state is None

    Rig(redis_server.url, memory()).run(scenario)


def test_two_histories_of_a_user_in_flight_leave_nothing_behind_an_erasure(
    redis_server: RedisServer, slow_road: SlowRoad
) -> None:
    """Were both written at once, the one that is not waited for would land behind the erasure."""

    async def scenario(cache: StateCache) -> None:
        lookups = [await cache.get("u", "v1", history) for history in (HISTORY, (1, 2))]
        before = slow_road.sent
        slow_road.open.clear()
        for lookup in lookups:
            keep(cache, lookup)
        assert cache.pending_writes == 1
        await eventually(lambda: slow_road.sent > before)
        erasing = asyncio.ensure_future(cache.erase("u"))
        slow_road.open.set()
        await erasing
        assert await cache.held("u") == []
        assert redis_server.calls("set") == 1

    Rig(slow_road.url, memory()).run(scenario)


def test_a_state_read_from_redis_while_its_user_is_erased_is_not_kept(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = memory()
    rig = Rig(redis_server.url, tier)

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        tier.clear()
        assert cache._redis is not None
        get = cache._redis.get

        async def erased_meanwhile(*what: str) -> object:
            answer = await get(*what)  # type: ignore[arg-type]
            await cache.erase("u")
            return answer

        monkeypatch.setattr(cache._redis, "get", erased_meanwhile)
        assert await source(cache) == "redis"
        assert await cache.held("u") == []

    rig.run(scenario)


def test_erasing_without_redis_is_an_error_not_a_lie(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        redis_server.kill()
        with pytest.raises(RedisDown):
            await cache.erase("u")
        assert await source(cache) == "miss"  # what could be erased is

    Rig(redis_server.url, memory()).run(scenario)


def test_an_erasure_reaches_the_memory_of_every_process(redis_server: RedisServer) -> None:
    rigs = [Rig(redis_server.url, memory()) for _ in range(3)]

    async def scenario() -> None:
        async with rigs[0] as a, rigs[1] as b, rigs[2] as c:
            for cache in (a, b, c):
                await stored(cache)
                await stored(cache, user="other")
                assert await source(cache) == "memory"
            await a.erase("u")
            for cache in (b, c):

                async def gone(cache: StateCache = cache) -> bool:
                    return await cache.held("u") == []

                await eventually(gone)
                assert await source(cache, user="other") == "memory"

    asyncio.run(scenario())


def test_an_answer_in_flight_elsewhere_does_not_bring_an_erased_user_back(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with Rig(redis_server.url, memory()) as a, Rig(redis_server.url, memory()) as b:
            lookup, heard = await b.get("u", "v1", HISTORY), b.erasures
            await a.erase("u")
            await eventually(lambda: b.erasures > heard)
            keep(b, lookup)
            assert await b.held("u") == [] and await a.held("u") == []

    asyncio.run(scenario())


def test_a_write_that_lands_behind_an_erasure_elsewhere_is_undone(
    redis_server: RedisServer, slow_road: SlowRoad
) -> None:
    async def scenario() -> None:
        async with Rig(redis_server.url, None) as a, Rig(slow_road.url, memory()) as b:
            lookup, before = await b.get("u", "v1", HISTORY), slow_road.sent
            slow_road.open.clear()
            keep(b, lookup)
            await eventually(lambda: slow_road.sent > before)  # the write is under way
            await a.erase("u")
            assert redis_server.calls("set") == 0
            slow_road.open.set()
            await eventually(lambda: redis_server.calls("set") == 1)
            with redis_server.client() as client:
                await eventually(lambda: client.keys("*") == [])

            async def forgotten() -> bool:  # the news of the erasure took the slow road too
                return await b.held("u") == []

            await eventually(forgotten)

    asyncio.run(scenario())


def test_a_process_that_may_have_missed_an_erasure_forgets_everybody(redis_server: RedisServer) -> None:
    rig = Rig(redis_server.url, memory())

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        assert await source(cache) == "memory"
        with redis_server.client() as client:
            assert client.client_kill_filter(_type="pubsub") == 1
            client.delete(*client.keys("*"))  # erased by a process that we do not hear

        async def gone() -> bool:
            return await cache.held("u") == []

        await eventually(gone)
        await stored(cache)
        assert await source(cache) == "memory"
        heard = cache.erasures
        async with Rig(redis_server.url, None) as other:
            await other.erase("u")
        await eventually(lambda: cache.erasures > heard)  # it listens again
        assert await cache.held("u") == []

    rig.run(scenario)
    assert rig.counts["memory", "cleared"] == 1


def test_rubbish_on_the_channel_is_no_obstacle(redis_server: RedisServer) -> None:
    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        with redis_server.client() as client:
            for rubbish in (b"", b"\xff\xfe", b"x" * 100_000):
                assert client.publish("streamrec:erased", rubbish) == 1
        async with Rig(redis_server.url, None) as other:
            await other.erase("u")

        async def gone() -> bool:
            return await cache.held("u") == []

        await eventually(gone)

    rig = Rig(redis_server.url, memory())
    rig.run(scenario)
    assert rig.counts["memory", "cleared"] == 0


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[RedisTier]:
    """Grows whenever a process connects to the channel of erasures, which it does without much delay here."""
    tiers: list[RedisTier] = []
    erased = RedisTier.erased

    def counted(self: RedisTier) -> AsyncIterator[str | None]:
        tiers.append(self)
        return erased(self)

    monkeypatch.setattr(RedisTier, "erased", counted)
    monkeypatch.setattr("serving.online.cache.RECONNECT", 0.1)
    return tiers


def test_a_broken_channel_is_logged_once(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, connected: list[RedisTier]
) -> None:
    async def scenario(cache: StateCache) -> None:
        redis_server.kill()
        await eventually(lambda: len(connected) > 3)  # it has tried again
        messages = [record.message for record in caplog.records if record.name == "streamrec.cache"]
        assert ["cannot follow erasures" in message for message in messages] == [True]

    with caplog.at_level("WARNING", "streamrec.cache"):
        Rig(redis_server.url, memory()).run(scenario)


def test_a_channel_that_falls_silent_is_noticed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, connected: list[RedisTier]
) -> None:
    monkeypatch.setattr("serving.online.tiers.HEARTBEAT", 0.5)
    rig = Rig(redis_server.url, memory())

    async def scenario(cache: StateCache) -> None:
        await stored(cache)
        before = redis_server.calls("ping")
        await eventually(lambda: redis_server.calls("ping") > before + 1)
        assert await source(cache) == "memory" and len(connected) == 1, "silence without news is no fault"
        redis_server.freeze()
        await eventually(lambda: len(connected) > 1)
        redis_server.thaw()
        await eventually(lambda: rig.counts["memory", "cleared"] == 1)

    rig.run(scenario)
