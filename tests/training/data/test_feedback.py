"""Feedback as the service keeps it becomes a data folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.online.feedback import Feedback, FeedbackFiles, LocalFeedback, RedisFeedback
from serving.online.redis_link import RedisLink, connect
from tests.conftest import RedisServer
from tests.training.shops import command
from tests.waiting import DEADLINE
from training.__main__ import main
from training.data.errors import DataError
from training.data.feedback import convert_feedback
from training.data.read import read_data

EVENTS = [  # time, user, item, event
    (30.2, "aa", "i3", "click"), (10.7, "aa", "i1", "purchase"), (10.9, "bb", "i1", "play"),
    (10.8, "bb", "i2", "click"), (5.0, "bb", "i4", "impression"), (6.0, "", "i4", "click"), (40.0, "aa", "i1", "like"),
]  # fmt: skip


Event = tuple[float, str, str, str]
CLICKS: list[Event] = [(at, f"u{user}", f"i{(user + at) % 5}", "click") for user in range(3) for at in range(4)]


async def fill(store: Feedback, events: Sequence[Event] = EVENTS) -> None:
    for number, (time, user, item, event) in enumerate(events):
        record = {"time": time, "user": user, "item_id": item, "event": event}
        if event == "purchase":
            record["value"] = 12.5
        await store.add(f"r{number}", record)


def histories(folder: Path) -> dict[str, list[str]]:
    data = read_data(folder)
    ids = data.items.item_ids
    return {
        user: [ids[row] for row in data.sequence[data.offsets[at] : data.offsets[at + 1]]]
        for at, user in enumerate(data.user_ids)
    }


EXPECTED = {"aa": ["i1", "i3", "i1"], "bb": ["i2", "i1"]}


def test_files_become_histories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(fill(LocalFeedback(FeedbackFiles(tmp_path / "feedback", 90))))
    (newest,) = (tmp_path / "feedback").glob("feedback-*")
    with newest.open("a") as file:
        file.write('{"time": 50, "user": "aa", "it')  # a kill cut it off
    assert main(["data", "feedback", str(tmp_path / "feedback"), "--out", str(tmp_path / "data")]) == 0
    assert "5 interactions, 1 nobody, 1 other events, 1 unreadable" in capsys.readouterr().out
    assert histories(tmp_path / "data") == EXPECTED
    data = read_data(tmp_path / "data")
    assert [data.type_names[kind] for kind in data.types] == ["purchase", "click", "like", "click", "play"]
    np.testing.assert_array_equal(data.values, [12.5, np.nan, np.nan, np.nan, np.nan])


def test_a_stream_becomes_the_same_histories(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.feedback.PAGE", 2)

    async def run() -> None:
        client: Any = connect(redis_server.url)
        await fill(RedisFeedback(RedisLink(client, DEADLINE), "shop", 60, 90, 1000))
        await client.aclose()

    asyncio.run(run())
    counts = convert_feedback(redis_server.url, tmp_path / "data", prefix="shop")
    assert counts == {"interactions": 5, "nobody": 1, "other events": 1}
    assert histories(tmp_path / "data") == EXPECTED


def test_events_can_be_chosen(tmp_path: Path) -> None:
    asyncio.run(fill(LocalFeedback(FeedbackFiles(tmp_path / "feedback", 90))))
    convert_feedback(str(tmp_path / "feedback"), tmp_path / "data", ["click", "impression"])
    assert histories(tmp_path / "data") == {"aa": ["i3"], "bb": ["i4", "i2"]}


def test_an_event_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(fill(LocalFeedback(FeedbackFiles(tmp_path / "feedback", 90))))
    arguments = [str(tmp_path / "feedback"), "--out", str(tmp_path / "data"), "--events", "purchase,clik"]
    assert main(["data", "feedback", *arguments]) == 2
    assert "no event 'clik'; choose from impression, click, " in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_run_reads_feedback_as_it_was_when_it_began(tmp_path: Path) -> None:
    store = LocalFeedback(FeedbackFiles(tmp_path / "feedback", 90))
    asyncio.run(fill(store, CLICKS))
    prepare = command("prepare", tmp_path / "feedback", tmp_path / "b")
    assert main(prepare) == 0
    asyncio.run(fill(store, [(50, "u9", "i9", "click")]))
    assert main(prepare) == 0  # or its data would be others than those it began with
    found = json.loads((tmp_path / "b.work/statistics.json").read_text())
    assert (found["users"], found["items"], found["events"]) == (3, 5, len(CLICKS))


@pytest.mark.parametrize("left", [[], ["interactions.parquet.partial"]])
def test_feedback_that_was_not_copied_to_the_end_is_copied_again(tmp_path: Path, left: list[str]) -> None:
    """A full disk leaves the folder, a kill half of the file as well."""
    asyncio.run(fill(LocalFeedback(FeedbackFiles(tmp_path / "feedback", 90)), CLICKS))
    snapshot = tmp_path / "b.work/feedback"
    snapshot.mkdir(parents=True)
    for name in ["../lock", *left]:
        (snapshot / name).write_bytes(b"half")
    assert main(command("prepare", tmp_path / "feedback", tmp_path / "b")) == 0
    assert [path.name for path in snapshot.iterdir()] == ["interactions.parquet"]
    assert len(read_data(snapshot).sequence) == len(CLICKS)


@pytest.mark.parametrize("source", ["missing", "empty", "redis://127.0.0.1:1", "rubbish://x"])
def test_without_feedback_one_sentence_says_so(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    where = source if "://" in source else str(tmp_path / source)
    with pytest.raises(DataError, match="name the folder|check the address"):
        convert_feedback(where, tmp_path / "data")
    assert not (tmp_path / "data").exists()
