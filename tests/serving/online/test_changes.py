"""Changes are applied by everybody, in the log's order, whoever made them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.errors import StoreError, StoreUnavailable
from serving.online import changes as module
from serving.online.changelog import ChangeLog, Entry, FileLog, Logged, MemoryLog
from serving.online.changes import Changes
from tests.waiting import eventually_async


class Replica:
    """Applies numbers, and keeps them."""

    def __init__(self, log: ChangeLog) -> None:
        self.applied: list[int] = []
        self.groups: list[int] = []
        self.changes = Changes(log, {"number": self._add, "broken": self._break})

    async def _add(self, entries: Sequence[Entry]) -> list[Any]:
        self.groups.append(len(entries))
        self.applied += [entry["n"] for entry in entries]
        return [ValueError("odd") if entry["n"] % 2 else entry["n"] * 10 for entry in entries]

    async def _break(self, entries: Sequence[Entry]) -> list[Any]:
        raise RuntimeError("broken")


class Unreachable(MemoryLog):
    """A log that can be away."""

    is_away = False

    async def read(self, after: str, wait: float = 0.0) -> list[Logged]:
        if self.is_away:
            raise StoreUnavailable("away")
        return await super().read(after, min(wait, 0.01))


def test_all_apply_what_anybody_makes_in_one_order_and_the_maker_gets_its_results(tmp_path: Path) -> None:
    async def check() -> None:
        path = tmp_path / "changes.jsonl"
        replicas = [Replica(FileLog(path)) for _ in range(3)]
        following = [asyncio.create_task(replica.changes.follow()) for replica in replicas]
        made = await asyncio.gather(
            *(replica.changes.make("number", [{"n": 2 * i}, {"n": 2 * i + 1}]) for i, replica in enumerate(replicas))
        )
        for i, (even, odd) in enumerate(made):
            assert even == 20 * i and isinstance(odd, ValueError)
        positions = [replica.changes.position for replica in replicas]
        await eventually_async(lambda: len({replica.changes.position for replica in replicas}) == 1)
        assert [replica.applied for replica in replicas] == [replicas[0].applied] * 3, positions
        assert sorted(replicas[0].applied) == list(range(6))
        late = Replica(FileLog(path))
        await late.changes.replay()
        assert late.applied == replicas[0].applied and late.groups == [6]
        for task in following:
            task.cancel()

    asyncio.run(check())


def test_what_cannot_be_applied_or_is_not_known_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        log = MemoryLog()
        replica = Replica(log)
        await log.append([{"kind": "of a newer version"}, {"no": "kind"}])
        following = asyncio.create_task(replica.changes.follow())
        [result] = await replica.changes.make("broken", [{}])
        assert isinstance(result, RuntimeError)
        assert await replica.changes.make("number", [{"n": 4}]) == [40]
        assert replica.applied == [4]
        following.cancel()

    asyncio.run(check())
    assert "newer version" in caplog.text and "could not be applied" in caplog.text


def test_a_log_that_is_away_keeps_nobody_waiting_and_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.01)

    async def check() -> None:
        log = Unreachable()
        await log.append([{"kind": "number", "n": 1}])
        replica = Replica(log)
        log.is_away = True
        await replica.changes.replay()
        assert replica.applied == []
        following = asyncio.create_task(replica.changes.follow())
        await eventually_async(lambda: replica.changes.lag > 0.05)
        log.is_away = False
        await eventually_async(lambda: replica.applied == [1])
        await eventually_async(lambda: replica.changes.lag < 0.05)
        following.cancel()

    asyncio.run(check())
    assert caplog.text.count("not followed until their log answers") == 1


def test_a_change_that_is_not_applied_in_time_says_that_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPLY_LIMIT", 0.01)

    async def check() -> None:
        replica = Replica(MemoryLog())  # and nobody follows
        with pytest.raises(StoreUnavailable, match="is stored and not yet applied"):
            await replica.changes.make("number", [{"n": 1}])
        await replica.changes.replay()
        assert replica.applied == [1]

    asyncio.run(check())


def test_a_damaged_log_ends_a_replay_and_later_the_following(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "changes.jsonl"
    path.write_text('{"kind":"number","n":2}\nrubbish\n')

    async def check() -> None:
        with pytest.raises(StoreError, match="damaged"):
            await Replica(FileLog(path)).changes.replay()
        replica = Replica(FileLog(path))
        waiting = asyncio.create_task(replica.changes.make("number", [{"n": 4}, {"n": 6}]))
        await eventually_async(lambda: "4" in path.read_text())
        with caplog.at_level(logging.ERROR):
            await replica.changes.follow()
        for change in (waiting, replica.changes.make("number", [{"n": 8}])):  # nobody waits for what cannot be
            with pytest.raises(StoreUnavailable, match="mend the log"):
                await change
        assert '"n":8' not in path.read_text()

    asyncio.run(check())
    assert "no longer followed" in caplog.text
