"""The way to Redis: a limit to each call, a pause after failures, and one round trip for what is asked at once."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import ResponseError

from serving.online.redis_link import MAX_PIPELINE, RedisDown, RedisLink, connect, trouble_of
from tests.conftest import RedisServer, SlowRoad
from tests.waiting import DEADLINE, eventually, eventually_async


def run(
    url: str, scenario: Callable[[RedisLink], Awaitable[None]], limit: float = DEADLINE, pause: float = 2.0
) -> None:
    async def main() -> None:
        client = connect(url)
        await RedisLink(client, DEADLINE).call(lambda c: c.ping())  # a connection is there
        try:
            await scenario(RedisLink(client, limit, pause=pause))
        finally:
            await client.aclose()

    asyncio.run(main())


def test_a_late_event_loop_is_not_taken_for_a_slow_redis(redis_server: RedisServer) -> None:
    async def scenario(link: RedisLink) -> None:
        before, started = redis_server.calls("ping"), time.monotonic()
        call = asyncio.ensure_future(link.call(lambda c: c.ping()))
        for _ in range(3):
            await asyncio.sleep(0)  # the command is on its way
        # The loop is held up for longer than the limit, and until the reply is there.
        eventually(lambda: redis_server.calls("ping") > before and time.monotonic() - started > 2 * link.limit)
        assert redis_server.calls("ping") == before + 1  # one round trip later its reply has been sent
        assert await call

    run(redis_server.url, scenario, limit=0.02)


def test_a_redis_that_does_not_answer_costs_the_limit_and_not_the_clients_own(redis_server: RedisServer) -> None:
    async def scenario(link: RedisLink) -> None:
        redis_server.freeze()
        try:
            with pytest.raises(RedisDown, match="no answer in time"):
                await link.execute_pipelined("PING")
        finally:
            redis_server.thaw()

    run(redis_server.url, scenario, limit=0.05)


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


def test_a_call_whose_caller_has_left_fails_in_silence() -> None:
    reported: list[object] = []

    async def scenario() -> None:
        sent, left, failing = (asyncio.Event() for _ in range(3))

        async def fail(client: object) -> None:
            sent.set()
            await left.wait()
            failing.set()
            raise ConnectionError

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
        caller = asyncio.ensure_future(RedisLink(None, DEADLINE).call(fail))  # type: ignore[arg-type]
        await sent.wait()
        caller.cancel()
        await asyncio.wait({caller})
        left.set()
        await failing.wait()
        await asyncio.sleep(0)  # its task is done
        gc.collect()  # a task reports an exception that nobody has seen when it is collected

    asyncio.run(scenario())
    assert reported == []


def test_what_is_asked_at_once_shares_a_round_trip(redis_server: RedisServer, slow_road: SlowRoad) -> None:
    with redis_server.client() as client:
        for i in range(MAX_PIPELINE):
            client.set(f"k{i}", i)
        client.rpush("list", "x")

    async def scenario(link: RedisLink) -> None:
        before = slow_road.sent
        replies = await asyncio.gather(*(link.execute_pipelined("GET", f"k{i}") for i in range(MAX_PIPELINE)))
        assert replies == [str(i).encode() for i in range(MAX_PIPELINE)]
        assert slow_road.sent == before + 1
        good, wrong = await asyncio.gather(
            link.execute_pipelined("GET", "k3"), link.execute_pipelined("GET", "list"), return_exceptions=True
        )
        assert good == b"3" and isinstance(wrong, ResponseError)  # a neighbour's error is not ours
        slow_road.open.clear()
        before = slow_road.sent
        asked = [
            asyncio.ensure_future(link.execute_pipelined("GET", f"k{i % MAX_PIPELINE}"))
            for i in range(4 * MAX_PIPELINE)
        ]
        await eventually_async(lambda: slow_road.sent >= before + 4)  # none waits for the reply to another
        slow_road.open.set()
        assert await asyncio.gather(*asked) == 4 * [str(i).encode() for i in range(MAX_PIPELINE)]

    run(slow_road.url, scenario)


def test_a_redis_that_is_still_loading_is_one_that_does_not_answer() -> None:
    """What it says to every command counts as a failure, also among the replies of a pipeline."""
    asked: list[bytes] = []

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            words = [await reader.readline() for _ in range(2 * int(line[1:]))][1::2]  # each behind its length
            is_greeting = words[0].strip() in (b"CLIENT", b"HELLO", b"SELECT")
            asked.extend([] if is_greeting else words[:1])
            writer.write(b"+OK\r\n" if is_greeting else b"-LOADING Redis is loading the dataset in memory\r\n")

    async def scenario() -> None:
        server = await asyncio.start_server(reply, "127.0.0.1", 0)
        client = connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0?protocol=2")
        link = RedisLink(client, DEADLINE, failures=2, pause=DEADLINE)
        for _ in range(4):
            with pytest.raises(RedisDown):
                await link.execute_pipelined("PING")
        await client.aclose()
        server.close()

    asyncio.run(scenario())
    assert len(asked) == 2  # then it is left alone


def test_trouble_is_told_in_one_sentence(redis_server: RedisServer) -> None:
    async def trouble(url: str) -> str | None:
        client = connect(url)
        try:
            return await trouble_of(RedisLink(client, DEADLINE))
        finally:
            await client.aclose()

    here = f"127.0.0.1:{redis_server.port}"
    assert asyncio.run(trouble(f"redis://{here}/0")) is None
    refused = "Redis refuses the user or the password; correct STREAMREC_REDIS_URL."
    assert asyncio.run(trouble(f"redis://nobody:wrong@{here}/0")) == refused
    no_database = "Redis has no database of this number; correct STREAMREC_REDIS_URL."
    assert asyncio.run(trouble(f"redis://{here}/99")) == no_database
    with redis_server.client() as client:
        client.acl_setuser("mute", enabled=True, nopass=True, commands=["-@all"])
    assert asyncio.run(trouble(f"redis://mute:any@{here}/0")) == "Redis answers with errors; see its log."
    redis_server.kill()
    assert asyncio.run(trouble(f"redis://{here}/0")) == "Redis does not answer; it is asked again."


def test_whoever_gives_up_leaves_the_others_their_replies(slow_road: SlowRoad) -> None:
    async def scenario(link: RedisLink) -> None:
        slow_road.open.clear()
        before = slow_road.sent
        hasty, patient = (asyncio.ensure_future(link.execute_pipelined("ECHO", word)) for word in ("a", "b"))
        await eventually_async(lambda: slow_road.sent > before)
        hasty.cancel()
        slow_road.open.set()
        assert await patient == b"b"

    run(slow_road.url, scenario)


def test_too_much_at_once_is_not_taken_for_a_dead_redis(redis_server: RedisServer) -> None:
    """A call too large for the limit costs the limit, but does not shut the others out while they are answered."""

    async def scenario(link: RedisLink) -> None:
        slow = [asyncio.ensure_future(link.call(lambda c: c.blpop("nothing", timeout=0.9))) for _ in range(5)]
        await eventually_async(lambda: redis_server.blocked_clients() == 5)
        assert await link.execute_pipelined("PING")
        failures = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(failure) for failure in failures} == {RedisDown}
        assert await link.execute_pipelined("PING")

    run(redis_server.url, scenario, limit=0.6, pause=DEADLINE)


def test_more_calls_than_connections_wait_instead_of_failing(redis_server: RedisServer) -> None:
    async def scenario(link: RedisLink) -> None:
        replies = await asyncio.gather(*(link.call(lambda c: c.ping()) for _ in range(100)))
        assert all(replies)

    run(redis_server.url, scenario, limit=DEADLINE)
