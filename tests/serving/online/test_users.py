"""Known histories, the same behaviour in process and in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

import pytest

from serving.errors import RequestError, StoreUnavailable
from serving.online.redis_link import RedisLink, connect
from serving.online.users import Bounds, MemoryUsers, RedisUsers, UserStore, digest
from serving.types import Event
from tests.conftest import RedisServer, SlowRoad
from tests.serving.online.links import FAILURES, Clock, CountedLink
from tests.waiting import eventually

NO_EVENTS = [
    b"\xff" + text
    for text in (b"{", b'"a"', b"[]", b'{"item_id": ""}', b'{"item_id": "a", "value": NaN}', b"[" * 99_999)
]
Scenario = Callable[[UserStore], Awaitable[None]]


def bounds(items: int = 5, nbytes: int = 1000, ttl: int = 60) -> Bounds:
    return Bounds(items, nbytes, ttl)


@pytest.fixture(params=["memory", "redis"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on an empty store that keeps 5 items a user."""
    if request.param == "memory":
        return lambda scenario: asyncio.run(scenario(MemoryUsers(100, 1 << 20, bounds())))  # type: ignore[arg-type]
    server: RedisServer = request.getfixturevalue("redis_server")

    async def with_redis(scenario: Scenario) -> None:
        client = connect(server.url)
        await scenario(RedisUsers(RedisLink(client, 2.0), bounds()))
        await client.aclose()

    return lambda scenario: asyncio.run(with_redis(scenario))


def test_events_are_appended_in_order_and_trimmed_to_the_newest(run: Callable[[Scenario], None]) -> None:
    async def scenario(users: UserStore) -> None:
        assert await users.get("u") == []
        assert await users.append("u", ["a", "b"]) == 2
        assert await users.append("u", ["c"]) == 3
        assert await users.get("u") == ["a", "b", "c"]
        assert await users.append("u", list("defg")) == 5
        assert await users.get("u") == list("cdefg")
        assert await users.append("u", list("0123456789")) == 5
        assert await users.get("u") == list("56789")

    run(scenario)


def test_ids_are_strings_whatever_they_look_like(run: Callable[[Scenario], None]) -> None:
    ids = ["007", "7", " ", "ü/漢字", "a\nb"]

    async def scenario(users: UserStore) -> None:
        await users.append("ü/7 ", ids)
        assert await users.get("ü/7 ") == ids
        assert await users.get("ü/7") == []

    run(scenario)


def test_events_are_kept_beside_ids(run: Callable[[Scenario], None]) -> None:
    history = ["a", Event("ü", "view", 2.5, 1.7e9), '{"item_id": "a"}', Event("b"), Event("c", None, None, 0.0)]

    async def scenario(users: UserStore) -> None:
        assert await users.append("u", history) == 5
        assert await users.get("u") == history
        assert await users.append("u", [Event("d", "x" * 64)]) == 5
        assert await users.get("u") == [*history[1:], Event("d", "x" * 64)]
        assert await users.delete("u") is True and await users.get("u") == []
        with pytest.raises(RequestError, match="At most 1000 bytes"):
            await users.append("u", [Event("d" * 200, "x" * 64)] * 4)

    run(scenario)


def test_delete_erases_one_user(run: Callable[[Scenario], None]) -> None:
    async def scenario(users: UserStore) -> None:
        await users.append("u", ["a"])
        await users.append("v", ["b"])
        assert await users.delete("u") is True
        assert await users.delete("u") is False
        assert await users.get("u") == [] and await users.get("v") == ["b"]

    run(scenario)


def test_concurrent_appends_lose_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario(users: UserStore) -> None:
        await asyncio.gather(*(users.append("u", [str(i)]) for i in range(5)))
        assert sorted(await users.get("u")) == list("01234")

    run(scenario)


def test_what_is_kept_of_a_user_is_bounded_in_bytes(run: Callable[[Scenario], None]) -> None:
    """1000 bytes in UTF-8, whatever the characters: the older items make room for the newer."""
    wide = ["\U0001f600" * 100 + str(i) for i in range(3)]  # 401 bytes each

    async def scenario(users: UserStore) -> None:
        assert await users.append("u", ["a", *wide[:2]]) == 3
        assert await users.append("u", wide[2:]) == 2
        assert await users.get("u") == wide[1:]
        assert await users.append("u", ["b"]) == 3
        assert await users.get("u") == [*wide[1:], "b"]

    run(scenario)


def test_more_than_is_kept_of_a_user_is_refused_and_changes_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario(users: UserStore) -> None:
        await users.append("u", ["a"])
        with pytest.raises(RequestError, match="1000 bytes") as refused:
            await users.append("u", ["x" * 250] * 5)
        assert refused.value.field == "items"
        assert await users.get("u") == ["a"]

    run(scenario)


def test_a_history_is_forgotten_some_time_after_its_last_event() -> None:
    async def scenario() -> None:
        clock = Clock()
        users = MemoryUsers(100, 1 << 20, bounds(ttl=60), clock)
        await users.append("u", ["a"])
        clock.now += 50
        await users.append("v", ["b"])
        await users.append("u", ["c"])
        clock.now += 50
        assert await users.get("u") == ["a", "c"] and await users.get("v") == ["b"]
        clock.now += 20
        assert await users.get("nobody") == [] and users.nbytes == 0  # whoever asks, what is old goes

    asyncio.run(scenario())


def test_redis_forgets_a_history_some_time_after_its_last_event(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        users = RedisUsers(RedisLink(client, 2.0), bounds(ttl=1000))
        await users.append("u", ["a"])
        with redis_server.client() as direct:
            (key,) = direct.keys("*")
            direct.expire(key, 5)
            await users.append("u", ["b"])
            assert 900 < direct.ttl(key) <= 1000
        await client.aclose()

    asyncio.run(scenario())


def test_memory_is_bounded_in_bytes_and_counts_them_right() -> None:
    async def scenario() -> None:
        users = MemoryUsers(1000, 20_000, bounds(100))
        for i in range(300):
            await users.append(f"u{i % 150}", [f"item {i} {j}" for j in range(5)])
            assert 0 < users.nbytes <= 20_000
        kept = [f"u{i}" for i in range(150) if await users.get(f"u{i}")]
        assert kept == [f"u{i}" for i in range(150 - len(kept), 150)] and 10 < len(kept) < 150  # the last to come
        for user in kept:
            assert await users.delete(user)
        assert users.nbytes == 0
        with pytest.raises(StoreUnavailable, match="MAX_KNOWN_BYTES"):
            await MemoryUsers(1000, 100, bounds()).append("u", ["a"])

    asyncio.run(scenario())


def test_what_this_service_cannot_have_written_is_not_read(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        users = RedisUsers(RedisLink(client, 2.0), bounds(20))
        await users.append("u", ["a"])
        with redis_server.client() as direct:
            direct.rpush(direct.keys("*")[0], b"\xff\xfe", b"", b"x" * 100_000, *NO_EVENTS, "ü".encode())
        assert await users.get("u") == ["a", "ü"]
        assert await users.append("u", ["b"]) <= 20 and "b" in await users.get("u")
        assert await users.delete("u") is True and await users.get("u") == []
        await client.aclose()

    asyncio.run(scenario())


def test_memory_is_bounded_by_users() -> None:
    async def scenario() -> None:
        users = MemoryUsers(2, 1 << 20, bounds())
        for user in "abc":
            await users.append(user, ["x"])
        assert await users.get("a") == [] and await users.get("c") == ["x"]

    asyncio.run(scenario())


def test_nothing_is_acknowledged_that_is_not_stored(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        users = RedisUsers(RedisLink(client, 2.0), bounds())
        await users.append("u", ["a"])
        redis_server.kill()
        for work in (users.append("u", ["b"]), users.get("u"), users.delete("u")):
            with pytest.raises(StoreUnavailable):
                await work
        await client.aclose()

    asyncio.run(scenario())


def test_replicas_that_append_at_once_lose_nothing(redis_server: RedisServer) -> None:
    """Four clients of their own append to one user; each one's events stay in its order, and none is missing."""

    async def scenario() -> None:
        clients = [connect(redis_server.url) for _ in range(4)]
        stores = [RedisUsers(RedisLink(client, 5.0), bounds(1000, 1 << 20)) for client in clients]

        async def replica(name: str, users: RedisUsers) -> None:
            for i in range(0, 100, 2):
                await users.append("u", [f"{name}{i}", f"{name}{i + 1}"])

        await asyncio.gather(*(replica(name, users) for name, users in zip("abcd", stores, strict=True)))
        kept = await stores[0].get("u")
        for name in "abcd":
            assert [item for item in kept if item[0] == name] == [f"{name}{i}" for i in range(100)]
        assert len(kept) == 400
        await asyncio.gather(*(RedisUsers(users._link, bounds(50)).append("u", ["x"]) for users in stores))
        with redis_server.client() as client:
            assert client.llen(client.keys("*")[0]) == 50  # bounded in Redis, not only in what is read
        for client in clients:
            await client.aclose()

    asyncio.run(scenario())


def test_the_histories_of_a_batch_are_one_round_trip(redis_server: RedisServer, slow_road: SlowRoad) -> None:
    async def scenario() -> None:
        client = connect(slow_road.url)
        users = RedisUsers(RedisLink(client, 5.0), bounds())
        for i in range(16):
            await users.append(f"u{i}", [str(i)])
        before = slow_road.sent
        histories = await asyncio.gather(*(users.get(f"u{i}") for i in range(16)))
        assert histories == [[str(i)] for i in range(16)] and slow_road.sent == before + 1
        await client.aclose()

    asyncio.run(scenario())


def test_a_full_redis_refuses_events_and_still_tells_and_erases(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        users = RedisUsers(RedisLink(client, 2.0), bounds())
        await users.append("u", ["a"])
        redis_server.fill()
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="make room"):
                await users.append("u", ["b"])
        assert await users.get("u") == ["a"]
        assert await users.delete("u") is True
        redis_server.make_room()
        assert await users.append("u", ["c"]) == 1
        await client.aclose()

    asyncio.run(scenario())


def test_something_else_under_the_key_is_refused_until_the_user_is_erased(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        users = RedisUsers(RedisLink(client, 2.0), bounds())
        await users.append("u", ["a"])
        with redis_server.client() as direct:
            direct.set(direct.keys("*")[0], "somebody else's")
        for work in (users.append("u", ["b"]), users.get("u")):
            with pytest.raises(StoreUnavailable, match="erase this user"):
                await work
        assert await users.delete("u") is True
        assert await users.append("u", ["b"]) == 1
        await client.aclose()

    asyncio.run(scenario())


def test_a_stalled_redis_is_reported_and_left_alone(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        link = CountedLink(client, 2.0, clock=Clock())
        users = RedisUsers(link, bounds())
        await users.append("u", ["a"])
        before, link.limit = link.sent, 0.1
        redis_server.freeze()
        try:
            for _ in range(50):
                with pytest.raises(StoreUnavailable):
                    await users.append("u", ["b"])
            assert link.sent == before + FAILURES
        finally:
            redis_server.thaw()
        await client.aclose()

    asyncio.run(scenario())


def test_no_user_id_is_readable_in_redis(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        client = connect(redis_server.url)
        await RedisUsers(RedisLink(client, 2.0), bounds(), b"secret").append("alice@example.com", ["a"])
        await client.aclose()

    asyncio.run(scenario())
    with redis_server.client() as client:
        keys = client.keys("*")
        assert len(keys) == 1 and b"alice" not in keys[0]


def test_the_digest_depends_on_the_secret() -> None:
    assert len({digest("u"), digest("u", b"s"), digest("v"), digest("v", b"s")}) == 4


def test_an_append_only_file_holds_an_erased_user_until_it_is_rewritten() -> None:
    """What SECURITY.md says of Redis' own file, and the command that it gives."""
    with ExitStack() as stack:
        server = RedisServer("--appendonly", "yes")
        stack.callback(server.close)

        def is_in_the_file() -> bool:
            with suppress(FileNotFoundError):  # Redis removes one while it is read: what is left is read again
                files = [path for path in server.folder.rglob("*") if path.is_file()]
                return any(digest("alice").encode() in path.read_bytes() for path in files)
            return is_in_the_file()

        async def scenario() -> None:
            client = connect(server.url)
            users = RedisUsers(RedisLink(client, 2.0), bounds())
            await users.append("alice", ["a"])
            assert await users.delete("alice") is True
            await client.aclose()

        asyncio.run(scenario())
        eventually(is_in_the_file)
        with server.client() as direct:
            direct.bgrewriteaof()
        eventually(lambda: not is_in_the_file())
