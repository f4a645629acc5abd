"""The log of changes in its three stores, and what is left of it after kills, full disks and damage."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serving.errors import RequestError, StoreError, StoreUnavailable
from serving.online.changelog import MAX_ENTRY_BYTES, ChangeLog, FileLog, MemoryLog, NoLog, RedisLog
from serving.online.redis_link import RedisLink, connect
from tests.conftest import RedisServer
from tests.waiting import DEADLINE

KEY = "test:changes"


@asynccontextmanager
async def redis_log(server: RedisServer) -> AsyncIterator[RedisLog]:
    client = connect(server.url)
    try:
        yield RedisLog(RedisLink(client, 1.0), KEY)
    finally:
        await client.aclose()


@asynccontextmanager
async def log_of(kind: str, tmp_path: Path, server: RedisServer) -> AsyncIterator[ChangeLog]:
    if kind == "redis":
        async with redis_log(server) as log:
            yield log
    else:
        yield FileLog(tmp_path / "state" / "changes.jsonl") if kind == "file" else MemoryLog()


async def _check_a_log(log: ChangeLog) -> None:
    assert await log.read("") == []
    await log.append([{"item": "a"}, {"item": "b"}])
    await log.append([{"item": "ü\n"}])
    found = await log.read("")
    assert [entry for _, entry in found] == [{"item": "a"}, {"item": "b"}, {"item": "ü\n"}]
    assert [entry for _, entry in await log.read(found[0].position)] == [{"item": "b"}, {"item": "ü\n"}]
    assert await log.read(found[-1].position, wait=0.01) == []
    waiting = asyncio.create_task(log.read(found[-1].position, wait=DEADLINE))
    await asyncio.sleep(0)
    await log.append([{"item": "late"}])
    assert [entry for _, entry in await waiting] == [{"item": "late"}]
    with pytest.raises(RequestError, match=str(MAX_ENTRY_BYTES)):
        await log.append([{"item": "small"}, {"item": "x" * MAX_ENTRY_BYTES}])
    assert len(await log.read("")) == 4  # nothing half done


@pytest.mark.parametrize("kind", ["memory", "file", "redis"])
def test_entries_are_read_in_order_from_anywhere_and_waited_for(
    kind: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    async def check() -> None:
        async with log_of(kind, tmp_path, redis_server) as log:
            await _check_a_log(log)

    asyncio.run(check())


def test_what_shares_no_store_takes_no_change() -> None:
    async def check() -> None:
        with pytest.raises(StoreUnavailable, match="STREAMREC_STATE_DIR"):
            await NoLog().append([{}])
        assert await NoLog().read("") == []

    asyncio.run(check())


# The file


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"

    async def check() -> None:
        logs = [FileLog(path) for _ in range(4)]
        await asyncio.gather(*(log.append([{"by": i, "n": n}]) for n in range(10) for i, log in enumerate(logs)))
        found = [[entry for _, entry in await log.read("")] for log in logs]
        assert len(found[0]) == 40 and found == [found[0]] * 4

    asyncio.run(check())


WRITER = """
import asyncio, sys
from pathlib import Path
from serving.online.changelog import FileLog

async def write():
    log = FileLog(Path(sys.argv[1]))
    for n in range(10**9):
        await log.append([{"n": n}, {"n": n, "text": "x" * 5000}])
        print(n, flush=True)

asyncio.run(write())
"""


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    writer.kill()
    acknowledged += [int(line) for line in writer.communicate()[0].split()]
    found = [entry["n"] for _, entry in asyncio.run(_all(FileLog(path)))]
    assert set(acknowledged) <= {n for n in found if found.count(n) == 2}
    assert found == sorted(found)


async def _all(log: ChangeLog) -> list[tuple[str, dict[str, object]]]:
    found: list[tuple[str, dict[str, object]]] = []
    while more := await log.read(found[-1][0] if found else ""):
        found += more
    return found


def test_a_last_line_that_was_cut_is_ignored_and_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "changes.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":2')
    log = FileLog(path)

    async def check() -> None:
        first = await log.read("")
        assert [entry for _, entry in first] == [{"n": 1}]
        with caplog.at_level(logging.WARNING):
            assert await log.read(first[-1].position) == await log.read(first[-1].position) == []
        assert caplog.text.count("was cut off") == 1
        await log.append([{"n": 3}])
        assert [entry for _, entry in await log.read(first[-1].position)] == [{"n": 3}]
        assert path.read_bytes() == b'{"n":1}\n{"n":3}\n'

    asyncio.run(check())


@pytest.mark.parametrize("damage", [b"{}}\n", b"[1]\n", b"\n", b"\xff\n", b"x" * (2 * MAX_ENTRY_BYTES)])
def test_damage_in_the_middle_is_an_error_that_says_where(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "changes.jsonl"
    path.write_bytes(b'{"n":1}\n')

    async def check() -> None:
        log = FileLog(path)
        position = (await log.read(""))[-1].position
        path.write_bytes(b'{"n":1}\n' + damage)
        with pytest.raises(StoreError, match=f"{path} is damaged at 8"):
            await log.read(position)

    asyncio.run(check())


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"

    async def check() -> None:
        log = FileLog(path)
        await log.append([{"n": 1}])
        position = (await log.read(""))[-1].position
        path.write_bytes(b"")
        with pytest.raises(StoreError, match="is shorter than it was"):
            await log.read(position)

    asyncio.run(check())


def test_a_file_that_cannot_be_read_for_now_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"

    async def check() -> None:
        log = FileLog(path)
        path.mkdir()
        with pytest.raises(StoreUnavailable, match="is tried again"):
            await log.read("")
        path.rmdir()
        await log.append([{"n": 1}])
        assert len(await log.read("")) == 1

    asyncio.run(check())


def test_a_long_file_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"
    lines = [json.dumps({"n": n, "text": "x" * 60_000}) for n in range(150)]
    path.write_text("\n".join(lines) + "\n")
    assert [entry["n"] for _, entry in asyncio.run(_all(FileLog(path)))] == list(range(150))


FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from serving.errors import StoreUnavailable
from serving.online.changelog import FileLog

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
log = FileLog(Path(sys.argv[1]))
asyncio.run(log.append([{"n": 1}]))
try:
    asyncio.run(log.append([{"n": 2}, {"n": 3, "text": "x" * 20_000}]))
except StoreUnavailable as error:
    print(error)
asyncio.run(log.append([{"n": 4}]))
"""


def test_where_no_room_is_left_a_change_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "changes.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert [entry["n"] for _, entry in asyncio.run(_all(FileLog(path)))] == [1, 4]


# Redis


def _refused(server: RedisServer, break_it: Callable[[], None], match: str) -> None:
    async def check() -> None:
        async with redis_log(server) as log:
            await log.append([{"n": 1}])
            break_it()
            with pytest.raises(StoreUnavailable, match=match):
                await log.append([{"n": 2}, {"n": 3}])

    asyncio.run(check())


def test_a_redis_that_is_full_takes_all_or_nothing(redis_server: RedisServer) -> None:
    _refused(redis_server, redis_server.fill, "make room")
    redis_server.make_room()
    with redis_server.client() as client:
        assert client.xlen(KEY) == 1


def test_a_redis_that_is_away_refuses_changes_and_is_followed_once_it_is_back(redis_server: RedisServer) -> None:
    async def check() -> None:
        async with redis_log(redis_server) as log:
            redis_server.kill()
            with pytest.raises(StoreUnavailable, match="try again"):
                await log.append([{"n": 1}])
            with pytest.raises(StoreUnavailable):
                await log.read("", wait=DEADLINE)
            redis_server.start()
            assert await log.read("") == []

    asyncio.run(check())


def test_what_is_no_log_in_redis_is_an_error(redis_server: RedisServer) -> None:
    async def check() -> None:
        async with redis_log(redis_server) as log:
            with redis_server.client() as client:
                client.xadd(KEY, {"other": "field"}, id="5-1")
            with pytest.raises(StoreError, match="damaged at 5-1"):
                await log.read("")

    asyncio.run(check())
