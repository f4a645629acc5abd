"""Offline scoring: the service's own answers, every user exactly once whatever happens, bad rows rejected."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.schemas.recommend import RecommendRequest
from app.settings import Settings
from serving import files
from serving.__main__ import main
from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import FolderInUse, ScoreError, StorageError
from serving.files import locked_folder
from serving.offline.input import Reject, User, open_histories
from serving.offline.score import Progress, run_here, score
from serving.offline.scorer import SCHEMA, Scorer, Task
from serving.types import Answer, Event, Request, Rules
from tests.answers import assert_same_answer
from tests.builders import tiny_bundle
from tests.tools import always_full, require_module
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def some_histories(users: int, seed: int = 0) -> dict[str, list[Any]]:
    """0 to 9 items each, some of them unknown; the tiny bundle reads 6."""
    rng = np.random.default_rng(seed)
    lists = [[f"i{row}" for row in rng.integers(0, 66, rng.integers(0, 10))] for _ in range(users)]
    return {"user_id": [f"u{n}" for n in range(users)], "history": lists}


def write_parquet(path: Path, data: dict[str, list[Any]], row_group: int = 1 << 20) -> Path:
    pq.write_table(pa.table(data), path, row_group_size=row_group)
    return path


def write_json(path: Path, data: dict[str, list[Any]]) -> Path:
    rows = zip(data["user_id"], data["history"], strict=True)
    path.write_text("".join(json.dumps({"user_id": u, "history": h}) + "\n" for u, h in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal but for rounding, which differs with who shares a batch."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a["user_id"], a["source"]) == (b["user_id"], b["source"])
        assert_same_answer(*(list(zip(row["items"], row["scores"], strict=True)) for row in (a, b)))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_answers_are_the_engines_in_the_order_of_the_histories(bundle, tmp_path, kind, exclude_seen):
    data = some_histories(90)
    write = write_parquet if kind == "parquet" else write_json
    source = write(tmp_path / f"histories.{kind}", data)
    task = Task(bundle, source, tmp_path / "out.parquet", k=4, beam=8, steps=1, exclude_seen=exclude_seen,
                batch=7, part_users=40)  # fmt: skip
    summary = score(task)
    engine = Engine(Bundle.load(bundle))
    catalogue = engine.bundle.catalogue
    expected = []
    for user, history in zip(data["user_id"], data["history"], strict=True):
        known = [row for item in history if (row := catalogue.row(item)) is not None]
        rules = Rules(exclude=tuple(known)) if exclude_seen else Rules()
        if known:
            request = Request(tuple(known[-6:]), 4, 8, 1, rules)
            (answer,) = engine.search([request], engine.encode([request.history]))
        else:
            rows = catalogue.popular(4, rules)
            answer = Answer(rows, [float(catalogue.popularity[row]) for row in rows])
        items = [catalogue.item_ids[row] for row in answer.items]
        source_of = "model" if known else "popularity"
        expected.append({"user_id": user, "items": items, "scores": answer.scores, "source": source_of})
    found = rows_of(task.out)
    assert_same(found, expected)
    assert (summary.users, summary.rejected) == (90, 0)
    assert 0 < summary.popular == sum(row["source"] == "popularity" for row in found) < 90
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "out.parquet"])
    assert pq.read_schema(task.out).equals(SCHEMA)


def test_what_is_not_said_is_what_the_service_takes():
    task = Task(Path("bundle"), Path("histories"), Path("out"))
    request = RecommendRequest()
    assert (task.k, task.exclude_seen) == (request.k, request.exclude_seen)
    assert task.beam == Settings.model_fields["default_beam_width"].default
    assert task.steps is None  # the bundle's


def test_parts_do_not_depend_on_row_groups_and_can_be_read_in_any_order(tmp_path):
    data = some_histories(100)
    path = write_parquet(tmp_path / "h.parquet", data, row_group=37)
    histories = open_histories(path, 10)
    parts = histories.parts()
    assert [part.rows for part in parts] == [10, 10, 10, 7, 10, 10, 10, 7, 10, 10, 6]
    for order in (parts, parts[::-1], parts[::3]):
        for part in order:
            users = histories.read(part)
            expected = data["user_id"][part.first_row : part.first_row + part.rows]
            assert [user.user_id for user in users] == expected
            assert [user.row for user in users] == list(range(part.first_row + 1, part.first_row + part.rows + 1))


class Killed(BaseException):
    """Stands for kill -9 at a chosen moment: no `except Exception` catches it."""


def test_a_run_killed_at_any_moment_resumes_with_every_user_exactly_once(bundle, tmp_path, monkeypatch):
    source = write_json(tmp_path / "h.jsonl", some_histories(30))
    with source.open("a") as file:
        file.write("{broken\n")
    whole = Task(bundle, source, tmp_path / "whole.parquet", k=3, beam=4, steps=0, batch=5, part_users=10)
    score(whole)
    engine = Engine(Bundle.load(bundle))
    replace_file = files.os.replace

    def attempt(task: Task, die_at: int) -> None:
        """Dies at the die_at-th moment; these are before and after each file appears, and after each batch."""
        moments = 0

        def live() -> None:
            nonlocal moments
            moments += 1
            if moments == die_at:
                raise Killed

        def dying_replace(old: Path, new: Path) -> None:
            live()
            replace_file(old, new)
            live()

        def run(task: Task, _: Bundle, parts: Any) -> Iterator[int]:
            for part in parts:
                for rows in Scorer(task, engine).score(part):
                    live()
                    yield rows

        with monkeypatch.context() as patched:
            patched.setattr(files.os, "replace", dying_replace)
            score(task, run)

    deaths = 0
    for die_at in range(1, 100):
        task = replace(whole, out=tmp_path / f"{die_at}.parquet")
        try:
            attempt(task, die_at)
            break
        except Killed:
            deaths += 1
        attempt(task, 0)
        assert_same(rows_of(task.out), rows_of(whole.out))
        assert task.rejects_file.read_text() == whole.rejects_file.read_text()
        assert not task.parts_folder.exists()
    assert deaths > 15


def test_after_kill_9_no_user_is_lost_or_scored_twice(bundle, tmp_path):
    users = 2000
    source = write_parquet(tmp_path / "h.parquet", some_histories(users))
    arguments = [sys.executable, "-m", "serving", "score", "--bundle", str(bundle), "--histories", str(source),
                 "--out", str(tmp_path / "out.parquet"), "--part-users", "100", "--k", "3", "--beam", "4"]  # fmt: skip
    parts = tmp_path / "out.parquet.parts"
    for wanted in (2, 10):
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
        eventually(lambda wanted=wanted: len(list(parts.glob("part-*.parquet"))) >= wanted)  # type: ignore[misc]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out.parquet").exists()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert 10 <= len(before) < 20
    last = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert last.returncode == 0, last.stderr
    assert f"{100 * len(before):,} of 2,000 users are already scored" in last.stderr and "left" in last.stderr
    assert [row["user_id"] for row in rows_of(tmp_path / "out.parquet")] == [f"u{n}" for n in range(users)]


def test_progress_is_a_line_every_few_seconds_and_one_at_the_end(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("serving.offline.score.time.monotonic", lambda: now)
    progress = Progress(total=9000, done=1000, every=10.0)
    for seconds, rows in ((4.0, 500), (6.0, 500), (3.0, 500), (8.0, 500), (1.0, 6000)):
        now += seconds
        progress.add(rows)
    assert [line.rstrip() for line in capsys.readouterr().err.splitlines()] == [
        "1,000 of 9,000 users are already scored",
        "scored 2,000 of 9,000 (22.2%), 100 users/s, 0:01:10 left",  # at 100 users a second of this run
        "scored 3,000 of 9,000 (33.3%), 95 users/s, 0:01:03 left",
        "scored 9,000 of 9,000 (100.0%), 364 users/s, 0:00:00 left",
    ]
    progress = Progress(total=1_000_000, done=0)
    now += 10.0
    progress.add(1000)
    assert "(0.1%), 100 users/s, 2:46:30 left" in capsys.readouterr().err


def test_on_a_terminal_progress_is_one_line_that_is_written_anew(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("serving.offline.score.time.monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(total=4000, done=0)
    for seconds, rows in ((0.4, 1000), (0.1, 1000), (0.5, 2000)):
        now += seconds
        progress.add(rows)
    found = capsys.readouterr().err
    assert [line.split(" (")[0] for line in found.splitlines()] == ["scored 2,000 of 4,000", "scored 4,000 of 4,000"]
    assert found.count("\r") == found.count("\n") == 1 and found.endswith("\n")


def test_finished_parts_are_not_scored_again(bundle, tmp_path):
    source = write_parquet(tmp_path / "h.parquet", some_histories(40))
    task = Task(bundle, source, tmp_path / "out.parquet", k=3, beam=4, part_users=10)
    scored: list[list[int]] = []

    def run(task: Task, bundle: Bundle, parts: Any, stop: int) -> Iterator[int]:
        scored.append([part.number for part in parts])
        yield from run_here(task, bundle, parts[:stop])
        if stop < 4:
            raise Killed

    with pytest.raises(Killed):
        score(task, lambda *a: run(*a, stop=2))
    task.part_file(0).write_bytes(task.part_file(0).read_bytes()[:-1])  # as after a disk error
    score(task, lambda *a: run(*a, stop=4))
    assert scored == [[0, 1, 2, 3], [0, 2, 3]]
    assert len(rows_of(task.out)) == 40


def test_bad_rows_are_rejected_with_row_user_and_reason(bundle, tmp_path):
    lines = [
        '{"user_id": "a", "history": ["i1"]}',
        '{"user_id": "b", "history": ',
        "",
        '{"user_id": "c", "history": null}',
        '{"history": ["i1"]}',
        '{"user_id": "d", "history": ["i1", null]}',
        '["i1"]',
        '{"user_id": 7, "history": [1, "i2"]}',
        '{"user_id": true, "history": []}',
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    task = Task(bundle, tmp_path / "h.jsonl", tmp_path / "out.parquet", k=3, beam=4, part_users=3)
    summary = score(task)
    assert [row["user_id"] for row in rows_of(task.out)] == ["a", "7"]
    assert (summary.users, summary.rejected) == (2, 6)
    rejects = [json.loads(line) for line in task.rejects_file.read_text().splitlines()]
    users = [(r["row"], r["user_id"]) for r in rejects]
    assert users == [(2, None), (4, "c"), (5, None), (6, "d"), (7, None), (9, None)]
    reasons = [r["reason"] for r in rejects]
    words = ("not JSON", "history", "user_id", "not an item id")
    assert all(word in reason for word, reason in zip(words, reasons, strict=False))
    (tmp_path / "h.jsonl").write_text(lines[0])
    score(task)
    assert not task.rejects_file.exists()  # those were the rejects of an earlier run


def test_every_bad_row_of_json_is_one_reject(bundle, tmp_path):
    bad: list[str | bytes] = [
        '{"user_id": "half\\ud83d", "history": []}',
        '{"user_id": "", "history": []}',
        '{"user_id": "%s", "history": []}' % ("x" * 257),
        '{"user_id": NaN, "history": []}',
        '{"user_id": "u", "history": NaN}',
        '{"user_id": "u", "history": "i1 i2"}',
        '{"user_id": "u", "history": [["i1"]]}',
        '{"user_id": "u", "history": ["i1", NaN]}',
        '{"user_id": "u", "history": ["half\\ud83d"]}',
        '{"user_id": "u", "history": ["%s"]}' % ("x" * 257),
        '{"user_id": %s, "history": []}' % ("9" * 5000),
        "[" * 100_000 + "]" * 100_000,
        b'{"user_id": "caf\xe9", "history": []}',
        b'{"user_id": "\xed\xa0\xbd", "history": []}',
        b"\0\0\0",
    ]
    lines = [line.encode() if isinstance(line, str) else line for line in bad]
    good = [b'\xef\xbb\xbf{"user_id": "a", "history": []}\r', b'{"user_id": 7, "history": ["\\ud83d\\ude00", 1]}']
    (tmp_path / "h.jsonl").write_bytes(b"\n".join([good[0], *lines, good[1]]))
    task = Task(bundle, tmp_path / "h.jsonl", tmp_path / "out.parquet", k=3, beam=4)
    score(task)
    assert [row["user_id"] for row in rows_of(task.out)] == ["a", "7"]
    rejects = [json.loads(line) for line in task.rejects_file.read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(2, 2 + len(bad)))


def test_many_leading_rows_without_a_history_do_not_condemn_a_file(bundle, tmp_path):
    bad = ['{"user_id": "new"}'] * 150 + ["# no JSON"] * 150
    (tmp_path / "h.jsonl").write_text("\n".join([*bad, '{"user_id": "a", "history": []}']))
    task = Task(bundle, tmp_path / "h.jsonl", tmp_path / "out.parquet", k=3, beam=4)
    assert (score(task).users, score(task).rejected) == (1, 300)
    (tmp_path / "h.jsonl").write_text("\n".join([*bad[150:], *bad[:150]]))
    assert (score(task).users, score(task).rejected) == (0, 300)


@pytest.mark.parametrize(
    ("user", "history"),
    [
        (pa.string_view(), pa.list_(pa.string_view())),
        (pa.large_string(), pa.large_list(pa.large_string())),
        (pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        (pa.binary(), pa.list_(pa.binary())),
        (pa.int64(), pa.list_(pa.int16())),
        (pa.string(), pa.list_view(pa.string())),
        (pa.string(), pa.list_(pa.string(), 2)),
    ],
)
def test_every_kind_of_text_and_list_in_parquet_is_read(tmp_path, user, history):
    users = pa.array(["7", "8"]).cast(user) if not pa.types.is_integer(user) else pa.array([7, 8])
    number = pa.types.is_integer(history.value_type)
    lists = pa.array([[1, 2], None] if number else [["1", "2"], None], history)
    pq.write_table(pa.table({"user_id": users, "history": lists}), tmp_path / "h.parquet")
    opened = open_histories(tmp_path / "h.parquet", 10)
    first, second = opened.read(opened.parts()[0])
    assert first == User(1, "7", ["1", "2"])
    assert isinstance(second, Reject) and second.user_id == "8" and "history is missing" in second.reason


def test_parquet_without_any_item_and_with_broken_text_is_read_row_by_row(tmp_path):
    path = tmp_path / "h.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"], "history": [[], []]}), path)  # Arrow calls that a list of nulls
    opened = open_histories(path, 10)
    assert opened.read(opened.parts()[0]) == [User(1, "a", []), User(2, "b", [])]
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), broken[::-1])
    pq.write_table(pa.table({"user_id": broken, "history": lists}), path)
    opened = open_histories(path, 10)
    rows = opened.read(opened.parts()[0])
    assert [type(row) for row in rows] == [User, Reject, User] and rows[0] == User(1, "a", ["c"])


def test_a_parquet_file_damaged_in_the_middle_ends_in_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "h.parquet", some_histories(500))
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    opened = open_histories(path, 500)
    with pytest.raises(ScoreError, match="is damaged"):
        opened.read(opened.parts()[0])


def test_nulls_in_parquet_are_rejected(bundle, tmp_path):
    data = {"user_id": ["a", "b", None, "d"], "history": [["i1"], None, ["i1"], ["i2", None]]}
    task = Task(bundle, write_parquet(tmp_path / "h.parquet", data), tmp_path / "out.parquet", k=3, beam=4)
    assert score(task).rejected == 3
    assert [row["user_id"] for row in rows_of(task.out)] == ["a"]
    assert [json.loads(line)["row"] for line in task.rejects_file.read_text().splitlines()] == [2, 3, 4]


def test_numbers_are_converted_to_ids(bundle, tmp_path):
    data = {"user_id": [11, 12], "history": [[1, 2], [3]]}
    task = Task(bundle, write_parquet(tmp_path / "h.parquet", data), tmp_path / "out.parquet", k=3, beam=4)
    score(task)
    assert [row["user_id"] for row in rows_of(task.out)] == ["11", "12"]


class Poisoned(Engine):
    """Fails whenever item 13 is in a history, like a bug in the search that one history triggers."""

    def search(self, requests: Any, states: Any) -> list[Answer]:
        if any(13 in request.history for request in requests):
            raise ValueError("no search for 13")
        return super().search(requests, states)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_events_are_read_as_their_items(bundle, tmp_path, kind):
    """The bundle weighs no types, so the answers are those of plain histories; rows that hold no event are rejected."""
    event = {"item_id": "i3", "type": "view", "value": 2.0, "timestamp": 1.7e9}
    wrong = event | {"timestamp": 1.7e12}
    data = {"user_id": list("abc"), "history": [[event], [event | {"item_id": "i4", "type": None}, event], [wrong]]}
    write = write_parquet if kind == "parquet" else write_json
    task = Task(bundle, write(tmp_path / f"e.{kind}", data), tmp_path / "out.parquet", k=3, beam=4)
    plain = {"user_id": list("ab"), "history": [["i3"], ["i4", "i3"]]}
    other = Task(bundle, write(tmp_path / f"p.{kind}", plain), tmp_path / "plain.parquet", k=3, beam=4)
    assert (score(task).rejected, score(other).rejected) == (1, 0)
    assert_same(rows_of(task.out), rows_of(other.out))
    (reject,) = [json.loads(line) for line in task.rejects_file.read_text().splitlines()]
    assert reject["row"] == 3 and "event 1 of the history has a timestamp" in reject["reason"]


def test_ids_and_events_may_be_mixed_in_json(tmp_path):
    path = write_json(tmp_path / "h.jsonl", {"user_id": ["u"], "history": [["a", {"item_id": 7, "type": "view"}, 8]]})
    opened = open_histories(path, 10)
    assert opened.read(opened.parts()[0]) == [User(1, "u", ["a", Event("7", "view"), "8"])]


def test_lists_of_other_structs_are_no_histories(bundle, tmp_path):
    path = write_parquet(tmp_path / "h.parquet", {"user_id": ["u"], "history": [[{"item": "i1"}]]})
    with pytest.raises(ScoreError, match="lists of item ids, or of events with an item_id"):
        open_histories(path, 10)


def test_a_row_on_which_the_engine_fails_is_rejected_and_the_rest_of_its_batch_answered(bundle, tmp_path):
    data = {"user_id": list("abcdef"), "history": [["i1"], ["i2"], ["i13"], ["i3", "i13"], ["i4"], ["i5"]]}
    task = Task(bundle, write_parquet(tmp_path / "h.parquet", data), tmp_path / "out.parquet", k=3, beam=4)
    engine = Poisoned(Bundle.load(bundle))
    summary = score(task, lambda task, _, parts: (n for p in parts for n in Scorer(task, engine).score(p)))
    assert (summary.users, summary.rejected) == (4, 2)
    assert [row["user_id"] for row in rows_of(task.out)] == list("abef")
    rejects = [json.loads(line) for line in task.rejects_file.read_text().splitlines()]
    assert [(r["row"], r["reason"]) for r in rejects] == [(n, "ValueError: no search for 13") for n in (3, 4)]


def test_an_engine_that_fails_on_every_row_stops_the_run(bundle, tmp_path):
    data = {"user_id": list("ab"), "history": [["i13"], ["i13"]]}
    task = Task(bundle, write_parquet(tmp_path / "h.parquet", data), tmp_path / "out.parquet", k=3, beam=4)
    engine = Poisoned(Bundle.load(bundle))
    with pytest.raises(ValueError, match="no search"):
        score(task, lambda task, _, parts: (n for p in parts for n in Scorer(task, engine).score(p)))
    assert not task.out.exists()


def test_a_part_scored_again_without_rejects_keeps_none_of_an_earlier_try(bundle, tmp_path):
    data = {"user_id": list("abc"), "history": [["i1"], ["i13"], ["i2"]]}
    task = Task(bundle, write_parquet(tmp_path / "h.parquet", data), tmp_path / "out.parquet", k=3, beam=4)
    loaded = Bundle.load(bundle)

    def killed_before_the_part(task: Task, _: Bundle, parts: Any) -> Iterator[int]:
        for part in parts:
            yield from Scorer(task, Poisoned(loaded)).score(part)
            task.part_file(part.number).unlink()
            raise Killed

    with pytest.raises(Killed):
        score(task, killed_before_the_part)
    assert task.part_rejects(0).exists()

    def killed_after_the_part(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        yield from run_here(task, bundle, parts)
        raise Killed

    with pytest.raises(Killed):
        score(task, killed_after_the_part)
    scored: list[int] = []
    summary = score(task, lambda task, _, parts: iter(scored.extend(part.number for part in parts) or []))
    assert (summary.users, summary.rejected, scored) == (3, 0, [])
    assert [row["user_id"] for row in rows_of(task.out)] == list("abc") and not task.rejects_file.exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("left", [0, 1, 15])
def test_a_file_that_has_become_shorter_ends_in_one_sentence(tmp_path, kind, left):
    write, path = write_parquet if kind == "parquet" else write_json, tmp_path / f"h.{kind}"
    parts = open_histories(write(path, some_histories(40)), 10).parts()
    write(path, some_histories(left))
    opened = open_histories(path, 10)
    with pytest.raises(ScoreError, match=r"(has changed since this run began|is damaged).*again"):
        opened.read(parts[-1])
    if left == 15:
        with pytest.raises(ScoreError, match="has changed since this run began; run the command again"):
            opened.read(parts[1])


class Instant(Engine):
    """Takes no time and no memory, so that the scoring around it is measured."""

    def encode(self, histories: Any) -> list:
        return [None] * len(histories)

    def search(self, requests: Any, states: Any) -> list[Answer]:
        return [Answer([1, 2, 3], [0.3, 0.2, 0.1]) for _ in requests]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_number_of_users(bundle, tmp_path, kind):
    engine = Instant(Bundle.load(bundle))
    peaks = []

    def run(task, _, parts):
        for part in parts:
            gc.collect()  # Python keeps thousands of freed tuples for reuse, which is not growth
            yield from Scorer(task, engine).score(part)

    for users in (500, 3_000):
        write = write_parquet if kind == "parquet" else write_json
        source = write(tmp_path / f"{users}.{kind}", some_histories(users))
        task = Task(bundle, source, tmp_path / f"out-{users}.parquet", k=3, beam=4, part_users=125)
        tracemalloc.start()
        score(task, run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pq.read_metadata(task.out).num_rows == users
    assert peaks[1] < 1.5 * peaks[0], peaks


@pytest.mark.parametrize("full", ["part-000001.parquet", "part-000001.rejects.jsonl"])
def test_a_full_disk_stops_the_run_with_one_sentence_and_keeps_finished_parts(bundle, tmp_path, full):
    source = write_json(tmp_path / "h.jsonl", some_histories(30))
    source.write_text(source.read_text().replace('{"user_id": "u15"', '{"uses_id": "u15"'))
    task = Task(bundle, source, tmp_path / "out.parquet", k=3, beam=4, part_users=10)

    def first_only(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        yield from run_here(task, bundle, parts[:1])
        raise Killed

    with pytest.raises(Killed):
        score(task, first_only)
    done = task.part_file(0).read_bytes()
    (task.parts_folder / f"{full}.partial").symlink_to(always_full())
    with pytest.raises(StorageError, match="is full; free some space"):
        score(task)
    assert task.part_file(0).read_bytes() == done and not task.part_file(1).exists()
    assert score(task).users == 29  # the link was removed with the unfinished file


def test_parts_of_another_run_are_never_mixed_in(bundle, tmp_path):
    source = write_parquet(tmp_path / "h.parquet", some_histories(20))
    task = Task(bundle, source, tmp_path / "out.parquet", k=3, beam=4, part_users=10)

    def first_only(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        yield from run_here(task, bundle, parts[:1])
        raise Killed

    with pytest.raises(Killed):
        score(task, first_only)
    for other in (replace(task, k=2), replace(task, steps=0), replace(task, part_users=5)):
        with pytest.raises(ScoreError, match="other histories, bundle or options"):
            score(other)
    write_parquet(tmp_path / "h.parquet", some_histories(20, seed=1))
    with pytest.raises(ScoreError, match="other histories, bundle or options"):
        score(task)
    with locked_folder(task.parts_folder), pytest.raises(FolderInUse, match="Another run is using"):
        score(task)
    (task.parts_folder / "run.json").unlink()  # as a run does that has ended, before it removes its parts
    scored: list[list[int]] = []

    def all_again(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        scored.append([part.number for part in parts])
        yield from run_here(task, bundle, parts)

    assert score(task, all_again).users == 20
    assert scored == [[0, 1]]


def test_a_run_is_resumed_with_the_steps_it_began_with_said_or_not(bundle, tmp_path):
    source = write_parquet(tmp_path / "h.parquet", some_histories(4))
    usual = Bundle.load(bundle).default_steps
    assert usual == 2

    def killed(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        raise Killed
        yield

    for began, same in ((None, 2), (2, None), (1, 1)):
        task = Task(bundle, source, tmp_path / f"out{began}.parquet", k=3, beam=4, steps=began)
        with pytest.raises(Killed):
            score(task, killed)
        with pytest.raises(ScoreError, match="other histories, bundle or options"):
            score(replace(task, steps=0))
        assert score(replace(task, steps=same)).users == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"user,item\n1,2\n", "neither Parquet nor JSON lines"),
        (b"PAR1 and nothing behind it", "is damaged"),
        (pa.table({"user": ["a"], "history": [["i1"]]}), "no column user_id"),
        (pa.table({"user_id": ["a"], "history": ["i1"]}), "must be lists of item ids"),
        (pa.table({"user_id": [0.5], "history": [["i1"]]}), "user_id must be strings"),
        (pa.table({"user_id": ["a"], "history": [[["i1"]]]}), "must be lists of item ids"),
        (pa.table([["a"], ["b"], [["i1"]]], names=["user_id", "user_id", "history"]), "2 columns named user_id"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_not_histories_ends_in_one_sentence(bundle, tmp_path, capsys, content, words):
    path = tmp_path / "h"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(content, path)
    code = main(["score", "--bundle", str(bundle), "--histories", str(path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("streamrec: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out.parts").exists()


def test_nothing_but_an_earlier_result_is_replaced(bundle, tmp_path):
    source = write_json(tmp_path / "h.jsonl", some_histories(6))
    task = Task(bundle, source, tmp_path / "out.parquet", k=3, beam=4)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "notes.txt").write_text("mine")
    pq.write_table(pa.table({"mine": [1]}), tmp_path / "mine.parquet")
    (tmp_path / "b.rejects.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "c.rejects.jsonl").mkdir()
    (tmp_path / "nested.rejects.jsonl").write_text("[" * 100_000)
    (tmp_path / "number.rejects.jsonl").write_text("7\n")
    for name, content in (("d", "notes.txt"), ("e", "part-000001.parquet")):  # of a program with the same names
        (tmp_path / f"{name}.parts").mkdir()
        (tmp_path / f"{name}.parts" / content).write_text("mine")
    (tmp_path / "f.parts").write_text("mine")
    refused = {
        "h.jsonl": "file of histories", "hard": "file of histories", "link": "not an earlier result",
        ".": "not an earlier result", "notes.txt": "not an earlier result", "mine.parquet": "not an earlier result",
        "b": "b.rejects.jsonl exists", "c": "c.rejects.jsonl exists",
        "nested": "nested.rejects.jsonl exists", "number": "number.rejects.jsonl exists",
        "d": "d.parts holds notes.txt", "e": "e.parts holds part-000001.parquet", "f": "f.parts is not a folder",
        "notes.txt/out": "cannot be written to",
    }  # fmt: skip
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, words in refused.items():
        with pytest.raises((ScoreError, StorageError), match=words):
            score(replace(task, out=tmp_path / name if name != "." else tmp_path))
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again = replace(task, histories=write_json(tmp_path / "g.rejects.jsonl", some_histories(6)), out=tmp_path / "g")
    with pytest.raises(ScoreError, match=r"g\.rejects\.jsonl is the file of histories"):
        score(again)
    with pytest.raises(ScoreError, match="lies in the bundle"):
        score(replace(task, out=bundle / "out.parquet"))
    task.out.touch()  # as by mktemp
    for _ in range(2):  # and over an earlier result
        assert score(task).users == 6


def test_bad_options_end_in_one_sentence(bundle, tmp_path, capsys):
    source = write_parquet(tmp_path / "h.parquet", some_histories(3))
    command = ["score", "--bundle", str(bundle), "--histories", str(source), "--out", str(tmp_path / "out")]
    for options, words in ((["--k", "60"], "--k"), (["--steps", "9"], "0..4"), (["--batch", "0"], "--batch")):
        assert main(command + options) == 2
        assert words in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path), *command[3:]]) == 2
    assert "no bundle" in capsys.readouterr().err
    assert main([*command, "--k", "3", "--beam", "5", "--include-seen"]) == 0
    assert "3 users" in capsys.readouterr().out
    assert {row["user_id"] for row in rows_of(tmp_path / "out")} == {"u0", "u1", "u2"}


def test_an_empty_file_gives_an_empty_result(bundle, tmp_path):
    (tmp_path / "h.jsonl").write_text("")
    task = Task(bundle, tmp_path / "h.jsonl", tmp_path / "out.parquet", k=3, beam=4)
    assert score(task).users == 0
    assert pq.read_table(task.out).equals(SCHEMA.empty_table())


ON_RAY = """
import sys
from dataclasses import replace
from pathlib import Path
from serving.errors import ScoreError
from serving.offline.ray import run_on_ray
from serving.offline.score import score
from serving.offline.scorer import Task

def on_ray(task, _, parts):
    before = [task.part_file(number).stat().st_mtime_ns for number in range(2)]
    done = []
    for rows in run_on_ray(task, parts, workers=1):
        done.append(rows)
        yield rows
    print("parts", sorted(done), before == [task.part_file(number).stat().st_mtime_ns for number in range(2)])

def blocked(task, _, parts):
    task.part_file(1).mkdir()  # a file cannot replace a folder
    return run_on_ray(task, parts, workers=1)

task = Task(*map(Path, sys.argv[1:]), k=3, beam=4, part_users=10)
print(score(task, on_ray))
try:
    score(replace(task, out=task.out.with_name("blocked.parquet")), blocked)
except ScoreError as error:
    print(error)
"""


def test_ray_actors_score_the_same_and_resume_a_run(bundle, tmp_path):
    """In a process of its own: Ray ends the one that uses it when it has lost touch with its cluster."""
    require_module("ray", "scoring with --engine ray is")
    source = write_json(tmp_path / "h.jsonl", some_histories(60))
    with source.open("a") as file:
        file.write("{broken\n")
    here = Task(bundle, source, tmp_path / "here.parquet", k=3, beam=4, part_users=10)
    score(here)
    task = replace(here, out=tmp_path / "ray.parquet")

    def two_only(task: Task, bundle: Bundle, parts: Any) -> Iterator[int]:
        yield from run_here(task, bundle, parts[:2])
        raise Killed

    with pytest.raises(Killed):
        score(task, two_only)
    arguments = [sys.executable, "-c", ON_RAY, str(bundle), str(source), str(task.out)]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 0, ended.stderr
    assert "20 of 61 users are already scored" in ended.stderr
    assert "parts [1, 10, 10, 10, 10] True" in ended.stdout  # what was there stays as it was
    assert "Summary(users=60, popular=" in ended.stdout and "rejected=1)" in ended.stdout
    assert "part-000001.parquet cannot be written" in ended.stdout  # as the actor reports
    assert_same(rows_of(task.out), rows_of(here.out))
    assert task.rejects_file.read_text() == here.rejects_file.read_text()
