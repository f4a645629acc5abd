"""Feedback is stored before it is acknowledged, counted once, kept for its time, and erased with its user."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serving.errors import StoreUnavailable
from serving.online import feedback
from serving.online.feedback import Added, FeedbackFiles, LocalFeedback, RedisFeedback
from serving.online.redis_link import RedisLink, connect
from tests.conftest import RedisServer
from tests.waiting import DEADLINE


def record(item: str = "i1", event: str = "click", user: str = "aa") -> dict[str, Any]:
    return {"user": user, "item_id": item, "event": event}


def local(files: FeedbackFiles | None = None) -> LocalFeedback:
    return LocalFeedback(files)


def in_redis(server: RedisServer, work: Callable[[RedisFeedback], Coroutine[Any, Any, Any]], **options: int) -> Any:
    async def run() -> Any:
        client = connect(server.url)
        try:
            chosen = {"window": 60, "retention_days": 90, "max_records": 1000} | options
            return await work(RedisFeedback(RedisLink(client, DEADLINE), "p", **chosen))
        finally:
            await client.aclose()

    return asyncio.run(run())


async def counted(store: feedback.Feedback) -> None:
    assert await store.add("r1", record(event="impression")) == Added(True, False)
    assert await store.add("r1", record()) == Added(True, True)
    assert await store.add("r1", record()) == Added(False, False)  # the same again
    assert await store.add("r1", record("i2")) == Added(True, False)  # another hit of the same
    assert await store.add("r2", record()) == Added(True, True)


def read(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("feedback-*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_an_event_counts_once_in_a_process(tmp_path: Path) -> None:
    asyncio.run(counted(local()))
    asyncio.run(counted(local(FeedbackFiles(tmp_path / "new", 90))))
    assert [(each["item_id"], each["event"]) for each in read(tmp_path / "new")] == [
        ("i1", "impression"), ("i1", "click"), ("i2", "click"), ("i1", "click")
    ]  # fmt: skip


def test_an_event_counts_once_in_all_replicas(redis_server: RedisServer) -> None:
    in_redis(redis_server, counted)
    with redis_server.client() as client:
        kept = [json.loads(fields[b"record"]) for _, fields in client.xrange("p:feedback")]
        assert [each["item_id"] for each in kept] == ["i1", "i1", "i2", "i1"]
        assert all(0 < client.ttl(key) <= 60 for key in client.keys("p:seen:*"))


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_SEEN", 3)

    async def run() -> list[bool]:
        store = local()
        return [(await store.add("r", record(f"i{n % 4}", "impression"))).is_new for n in range(8)]

    assert asyncio.run(run()) == [True] * 8  # each was forgotten before it came again


def test_those_who_come_together_wait_for_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, writes = FeedbackFiles(tmp_path, 90), []
    write = files._append
    monkeypatch.setattr(files, "_append", lambda lines: (writes.append(lines.count(b"\n")), write(lines)))

    async def run() -> None:
        await asyncio.gather(*(local(files).add(f"r{n}", record(f"i{n}")) for n in range(50)))

    asyncio.run(run())
    assert len(writes) <= 3 and sum(writes) == len(read(tmp_path)) == 50


def test_a_disk_that_refuses_counts_nothing_and_the_event_may_come_again(tmp_path: Path) -> None:
    (tmp_path / "feedback").write_text("a file is in the way")
    store = local(FeedbackFiles(tmp_path / "feedback", 90))

    async def run() -> None:
        with pytest.raises(StoreUnavailable, match="cannot be written"):
            await store.add("r", record())
        (tmp_path / "feedback").unlink()
        assert await store.add("r", record()) == Added(True, True)

    asyncio.run(run())
    assert read(tmp_path / "feedback") == [record()]


class Disk:
    """Files that write when the test lets them, or cannot."""

    def __init__(self, error: StoreUnavailable | None = None) -> None:
        self.reached, self.released, self.error = asyncio.Event(), asyncio.Event(), error
        self.lines: list[Any] = []

    async def append(self, written: Any) -> None:
        self.reached.set()
        await self.released.wait()
        if self.error is not None:
            raise self.error
        self.lines.append(written)


@pytest.mark.parametrize("error", [None, StoreUnavailable("The disk is full.")], ids=["stored", "refused"])
def test_the_same_event_again_waits_for_the_first_to_be_stored(error: StoreUnavailable | None) -> None:
    async def run() -> None:
        disk = Disk(error)
        store = local(disk)  # type: ignore[arg-type]
        adds = [asyncio.create_task(store.add("r", record())) for _ in range(3)]
        await disk.reached.wait()
        await asyncio.sleep(0)
        assert not any(add.done() for add in adds)
        disk.released.set()
        results = await asyncio.gather(*adds, return_exceptions=True)
        if error is not None:
            assert results == [error] * 3 and disk.lines == []
            disk.error = None  # it may come again
            results = [await store.add("r", record()) for _ in range(3)]
        assert results == [Added(True, True), Added(False, False), Added(False, False)] and disk.lines == [record()]
        assert store._storing == {}

    asyncio.run(run())


def test_an_event_whose_client_has_left_is_stored_once() -> None:
    async def run() -> None:
        disk = Disk()
        store = local(disk)  # type: ignore[arg-type]
        first = asyncio.create_task(store.add("r", record()))
        await disk.reached.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        again = asyncio.create_task(store.add("r", record()))
        await asyncio.sleep(0)
        disk.released.set()
        assert await again == await store.add("r", record()) == Added(False, False)
        assert disk.lines == [record()]

    asyncio.run(run())


def test_more_than_the_disk_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_PENDING", 5)

    async def run() -> list[Any]:
        files = FeedbackFiles(tmp_path, 90)
        return await asyncio.gather(*(files.append(record(f"i{n}")) for n in range(8)), return_exceptions=True)

    results = asyncio.run(run())
    assert [isinstance(each, StoreUnavailable) for each in results] == [False] * 5 + [True] * 3
    assert len(read(tmp_path)) == 5


def test_a_file_ends_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    for days in (1, 3, 4, 90):
        (tmp_path / f"feedback-{now - timedelta(days=days):%Y-%m-%d}-0001.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("not ours")
    monkeypatch.setattr(feedback, "MAX_FILE_BYTES", 1)
    files = FeedbackFiles(tmp_path, retention_days=3)

    async def run() -> None:
        for number in range(3):
            await files.append(record(f"i{number}"))

    asyncio.run(run())
    days = sorted(path.name[9:19] for path in tmp_path.glob("feedback-*"))
    assert days[:2] == [f"{now - timedelta(days=days):%Y-%m-%d}" for days in (3, 1)] and len(days) == 5
    assert (tmp_path / "notes.txt").exists()


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / f"feedback-{datetime.now(UTC):%Y-%m-%d}-0001.jsonl"
    path.write_text('{"user":"aa"}\n{"user":"b')
    asyncio.run(FeedbackFiles(tmp_path, 90).append(record()))
    assert path.read_text().splitlines() == ['{"user":"aa"}', '{"user":"b', json.dumps(record(), separators=(",", ":"))]


def test_a_user_is_erased_from_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_FILE_BYTES", 1)
    store = local(FeedbackFiles(tmp_path, 90))

    async def run() -> None:
        for number, user in enumerate(["aa", "bb", "aa", "", "aabb"]):
            await store.add(f"r{number}", record('"user":"aa"', user=user))
        await store.erase("aa")
        await store.erase("nobody")
        await store.add("r9", record(user="cc"))

    asyncio.run(run())
    assert [each["user"] for each in read(tmp_path)] == ["bb", "", "aabb", "cc"]


def test_what_waits_for_the_disk_is_erased_with_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_write = threading.Event(), threading.Event()

    def slow(self: FeedbackFiles, lines: bytes, append: Any = FeedbackFiles._append) -> None:
        begun.set()
        assert may_write.wait(DEADLINE)
        append(self, lines)

    monkeypatch.setattr(FeedbackFiles, "_append", slow)

    async def run() -> None:
        files = FeedbackFiles(tmp_path, 90)
        adding = [asyncio.create_task(files.append(record(user="aa")))]  # on its way to the disk
        await asyncio.to_thread(begun.wait, DEADLINE)
        adding += [asyncio.create_task(files.append(record(user=user))) for user in ("aa", "bb")]  # not yet
        await asyncio.sleep(0)
        erasing = asyncio.create_task(files.erase("aa"))
        await asyncio.sleep(0)
        may_write.set()
        await asyncio.gather(*adding, erasing)

    asyncio.run(run())
    assert [each["user"] for each in read(tmp_path)] == ["bb"]


async def forgotten(store: feedback.Feedback) -> None:
    sent = [("r1", record()), ("r1", record("i2")), ("r2", record(user="bb")), ("r3", record(user="aabb"))]
    sent = [(id, {"recommendation_id": id, **each}) for id, each in sent]
    for id, each in sent:
        await store.add(id, each)
    await store.erase("aa")
    assert await store.count("aa") == 0
    added = [await store.add(id, each) for id, each in sent]
    assert added == [Added(True, True), Added(True, False), Added(False, False), Added(False, False)]
    assert [await store.count(user) for user in ("aa", "bb", "aabb", "nobody")] == [2, 1, 1, 0]


def test_an_erased_user_s_events_are_not_known_as_counted(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "PAGE", 1)
    asyncio.run(forgotten(local(FeedbackFiles(tmp_path / "new", 90))))
    in_redis(redis_server, forgotten)


def test_a_record_that_somebody_else_wrote_is_erased_too(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        for more in ({}, {"record": "{"}, {"record": "[]"}, {"record": "{}"}):
            client.xadd("p:feedback", {"user": "aa", **more})
        assert in_redis(redis_server, lambda store: store.count("aa")) == 4
        in_redis(redis_server, lambda store: store.erase("aa"))
        assert client.xlen("p:feedback") == 0


def test_feedback_that_cannot_be_read_is_not_counted_as_none(tmp_path: Path) -> None:
    path = tmp_path / f"feedback-{datetime.now(UTC):%Y-%m-%d}-0001.jsonl"
    path.mkdir()
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        asyncio.run(FeedbackFiles(tmp_path, 90).count("aa"))


def test_a_user_is_erased_from_redis(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "PAGE", 3)

    async def run(store: RedisFeedback) -> None:
        for number in range(10):
            await store.add(f"r{number}", record(user="aa" if number % 2 else "bb"))
        await store.erase("aa")

    in_redis(redis_server, run)
    with redis_server.client() as client:
        assert [fields[b"user"] for _, fields in client.xrange("p:feedback")] == [b"bb"] * 5


def test_redis_keeps_so_many_for_so_long(redis_server: RedisServer) -> None:
    async def fill(store: RedisFeedback) -> None:
        await asyncio.gather(*(store.add(f"r{number}", record()) for number in range(600)))

    in_redis(redis_server, fill, max_records=100)
    with redis_server.client() as client:
        assert 100 <= client.xlen("p:feedback") < 300  # Redis drops them by the hundred
        client.delete("p:feedback")
        for number in range(200):  # long ago
            client.xadd("p:feedback", {"user": "", "record": "{}"}, id=f"{number + 1}-0")
    in_redis(redis_server, lambda store: store.add("new", record()))
    with redis_server.client() as client:
        assert client.xlen("p:feedback") < 120


def test_a_redis_that_is_away_or_full_counts_nothing(redis_server: RedisServer) -> None:
    redis_server.fill()

    async def refused(store: RedisFeedback) -> None:
        with pytest.raises(StoreUnavailable):
            await store.add("r", record())
        with pytest.raises(StoreUnavailable):
            await RedisFeedback(RedisLink(connect("redis://127.0.0.1:1"), 1.0), "p", 60, 90, 10).erase("aa")

    in_redis(redis_server, refused)
    with redis_server.client() as client:
        client.config_set("maxmemory", 0)
    assert in_redis(redis_server, lambda store: store.add("r", record())) == Added(True, True)
