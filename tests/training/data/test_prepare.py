"""Reading a data folder, its checks, the splits and the statistics."""

from __future__ import annotations

import gzip
import json
import os
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.errors import DataError
from training.data.given_ids import load_given_ids
from training.data.prepare import (
    chronological,
    describe,
    learnt_until,
    leave_one_out,
    sample_events,
    split_by,
    statistics,
    time_quantiles,
    weigh,
    without_learnt,
)
from training.data.read import read_data

HEADER = "user_id,item_id,timestamp\n"
REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def folder_with(path: Path, events: str, items: list[dict] | None = None) -> Path:
    (path / "interactions.csv").write_text(events, encoding="utf-8")
    if items is not None:
        (path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def ids_of(data, user: str) -> list[str]:
    return [data.items.item_ids[item] for item in data.events(data.user_ids.index(user))]


def test_ids_stay_strings_and_ties_keep_file_order(tmp_path):
    events = HEADER + "007,01,5\n7,1,1\n007,1,5\n007,02,3\n7,01,2\n"
    data = read_data(folder_with(tmp_path, events, [{"item_id": "02"}, {"item_id": "1"}, {"item_id": "01"}]))
    assert data.user_ids == ["007", "7"]
    assert data.items.item_ids == ["02", "1", "01"]  # the file's order
    assert ids_of(data, "007") == ["02", "01", "1"]  # 3, then the two at 5 as the file has them
    assert ids_of(data, "7") == ["1", "01"]
    assert data.sequence.dtype == np.int32 and data.offsets.tolist() == [0, 3, 5]
    assert data.times.tolist() == [3, 5, 5, 1, 2]


TYPED = (
    "user_id,item_id,timestamp,type,value\nu,a,1,view,\nu,b,2,buy,9.5\nu,c,3,,\nu,a,4,buy,\nv,b,1,view,\n"
    "w,a,1,buy,1\nw,b,2,buy,\nw,c,3,buy,\n"
)


def test_events_weigh_by_their_type_and_those_of_weight_0_have_not_happened(tmp_path):
    read = read_data(folder_with(tmp_path, TYPED))
    assert read.type_names == ("buy", "view") and read.types.tolist() == [1, 0, -1, 0, 1, 0, 0, 0]
    np.testing.assert_array_equal(read.values, [np.nan, 9.5, np.nan, np.nan, np.nan, 1, np.nan, np.nan])
    assert weigh(read, {}) is read
    data = weigh(read, {"view": 0.0, "buy": 2.5})
    assert data.user_ids == ["u", "w"] and data.offsets.tolist() == [0, 3, 6]  # v did nothing but look
    assert ids_of(data, "u") == ["b", "c", "a"] and data.times.tolist() == [2, 3, 4, 1, 2, 3]
    assert data.weights.tolist() == [2.5, 1, 2.5, 2.5, 2.5, 2.5] and data.types.tolist() == [0, -1, 0, 0, 0, 0]
    shown = describe(data)
    assert "2 events of types with weight 0" in shown and re.search(r"type buy +5\n", shown)
    split = split_by(data, "leave-one-out")
    assert [events.weights.tolist() for events in split.train_events] == [[2.5], [2.5]]
    assert [events.weights.tolist() for events in split.test_events] == [[2.5, 1], [2.5, 2.5]]
    assert sample_events(split.valid_events, 1)[0] in split.valid_events and sample_events(None, 1) is None
    assert split_by(read, "leave-one-out").train_events is None


@pytest.mark.parametrize(
    ("weights", "words"),
    [({"purchase": 2.0}, "no events of type 'purchase'.*buy, view"), ({"view": 0.0, "buy": 0.0}, "no event of a type")],
)
def test_types_that_fit_no_event_are_refused(tmp_path, weights, words):
    typed = "".join(line for line in TYPED.splitlines(keepends=True) if ",c,3,," not in line)
    with pytest.raises(DataError, match=words):
        weigh(read_data(folder_with(tmp_path, typed)), weights)


def test_item_text_is_flattened_and_cold_items_are_kept(tmp_path):
    items = [
        {"item_id": 12, "title": "A", "categories": [["x", "y"], ["x", "z"]], "asin": "ignored"},
        {"item_id": "b", "categories": None, "brand": "", "description": ["one", "two"]},
        {"item_id": "c", "categories": ["k", " k "]},
    ]
    data = read_data(folder_with(tmp_path, HEADER + "u,12,1\nu,b,2\nu,12,3\n", items))
    assert data.items.item_ids == ["12", "b", "c"]
    assert data.items.titles == ["A", None, None]
    assert data.items.categories == [["x", "y", "z"], [], ["k"]]
    assert data.items.brands[1] is None and data.items.descriptions[1] == "one two"
    assert data.items.has_text
    assert data.skipped == {"items without an event (kept in the catalogue)": 1}


def test_the_name_of_a_folder_can_be_written_whatever_its_bytes(tmp_path, monkeypatch):
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9"))
    folder.mkdir()
    folder_with(folder, HEADER + "u,a,1\n")
    monkeypatch.chdir(folder)
    assert read_data(Path(".")).name == "caf\ufffd"


def test_without_items_file_the_order_of_appearance_is_hidden(tmp_path):
    ids = [f"i{number}" for number in range(50)]
    data = read_data(folder_with(tmp_path, HEADER + "".join(f"u,{item},{t}\n" for t, item in enumerate(ids))))
    assert sorted(data.items.item_ids) == sorted(ids)
    assert data.items.item_ids != ids and data.items.item_ids != sorted(ids)
    assert ids_of(data, "u") == ids
    assert not data.items.has_text


def test_csv_gzip_and_parquet_give_the_same_data(tmp_path):
    rows = [("b", "1", "2024-01-02"), ("a", "2", "2024-01-01T12:00:00Z"), ("b", "2", "2024-01-01 00:00:00")]
    folders = [tmp_path / name for name in ("csv", "gz", "parquet")]
    for folder in folders:
        folder.mkdir()
    text = HEADER.replace("timestamp", "timestamp_or_order") + "".join(",".join(row) + "\n" for row in rows)
    folder_with(folders[0], text)
    (folders[1] / "interactions.csv.gz").write_bytes(gzip.compress(("\ufeff" + text).encode()))
    users, items, times = zip(*rows, strict=True)
    moments = [datetime.fromisoformat(time).replace(tzinfo=None) for time in times]
    pq.write_table(
        pa.table(
            {"timestamp": pa.array(moments, pa.timestamp("ns")), "item_id": [int(i) for i in items], "user_id": users}
        ),
        folders[2] / "interactions.parquet",
    )
    first, *others = [read_data(folder) for folder in folders]
    assert first.times.tolist() == [1704067200.0, 1704153600.0, 1704110400.0]  # by `date -u +%s`
    for other in others:
        assert other.user_ids == first.user_ids == ["b", "a"]
        assert other.items == first.items
        assert np.array_equal(other.sequence, first.sequence) and np.array_equal(other.times, first.times)


@pytest.mark.parametrize(
    ("events", "items", "says"),
    [
        ("", None, "is empty"),
        (HEADER, None, "no data rows"),
        ("user_id,timestamp\nu,1\n", None, "no column item_id"),
        ("user_id,item_id\nu,1\n", None, "no column timestamp or timestamp_or_order"),
        (HEADER + "u,1,1\nu,9,2\n", [{"item_id": 1}], "row 2: item '9' is not in items.jsonl"),
        (HEADER + "u,1,1\n,1,2\n", None, "row 2: user_id is empty"),
        (HEADER + 'u,1,1\nu,"",2\n', None, "row 2: item_id is empty"),
        (HEADER + "u,1,1\nu,1,soon\n", None, "row 2: 'soon' is not a time"),
        (HEADER + "u,1,1\nu,1,2024-01-01\n", None, "row 2: '2024-01-01' is not a time"),
        (HEADER + "u,1,2024-01-01\nu,1,7\n", None, "row 2: '7' is not a time"),
        (HEADER + "u,1,\n", None, "row 1: the time is empty"),
        (HEADER + "u,1,inf\n", None, "row 1: 'inf' is not a time"),
        (HEADER + "u,1,1\nu,1,2\nu,1,2,3\n", None, "row 3: 4 fields where the header has 3"),
        (HEADER + "u,1,1\n", [{"item_id": 1}, {"item_id": "1"}], "row 2: item_id '1' is already in row 1"),
        (HEADER + "u,1,1\n", [{"item_id": 1}, {"item_id": None}], "row 2: no item_id"),
        (HEADER + "u,1,1\n", [{"item_id": 1}, {"title": "x"}], "row 2: no item_id"),
        (HEADER + "u,1,1\n", [{"item_id": 1, "title": {"en": "x"}}], "row 1: title is an object"),
        (HEADER + "u,1,1\n", [], "has no items"),
    ],
)
def test_malformed_input_ends_in_one_sentence(tmp_path, events, items, says):
    with pytest.raises(DataError) as error:
        read_data(folder_with(tmp_path, events, items))
    message = str(error.value)
    assert says in message and str(tmp_path) in message and "\n" not in message


def test_broken_files_end_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no interactions"):
        read_data(tmp_path)
    whole = gzip.compress((HEADER + "".join(f"u{n % 97},{n % 31},{n}\n" for n in range(5000))).encode())
    (tmp_path / "interactions.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"interactions.csv.gz cannot be read"):
        read_data(tmp_path)
    (tmp_path / "interactions.csv").write_text(HEADER + "u,1,1\n")
    with pytest.raises(DataError, match="keep one of them"):
        read_data(tmp_path)
    (tmp_path / "interactions.csv.gz").unlink()
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n{"item_id": \n')
    with pytest.raises(DataError, match="row 2: not valid JSON"):
        read_data(tmp_path)
    (tmp_path / "items.jsonl").unlink()
    (tmp_path / "interactions.csv").unlink()
    (tmp_path / "interactions.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"interactions.parquet cannot be read"):
        read_data(tmp_path)
    pq.write_table(pa.table({"user_id": ["u"], "item_id": [1.5], "timestamp": [1]}), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match="column item_id is double"):
        read_data(tmp_path)


def test_leave_one_out_by_hand(tmp_path):
    items = [{"item_id": number} for number in range(6)]
    events = HEADER + "a,0,1\na,1,2\na,2,3\na,3,4\nb,4,1\nb,5,2\nc,5,1\nd,2,9\nd,1,8\nd,0,7\n"
    data = read_data(folder_with(tmp_path, events, items))
    split = leave_one_out(data)
    assert [sequence.tolist() for sequence in split.train] == [[0, 1], [4, 5], [5], [0]]
    assert split.train_users.tolist() == [0, 1, 2, 3]
    assert split.valid_users.tolist() == split.test_users.tolist() == [0, 3]
    assert [history.tolist() for history in split.valid_history] == [[0, 1], [0]]
    assert split.valid_target.tolist() == [2, 1]
    assert [history.tolist() for history in split.test_history] == [[0, 1, 2], [0, 1]]
    assert split.test_target.tolist() == [3, 2]
    assert data.skipped["users with fewer than 3 events (used for training only)"] == 2
    text = describe(data, split)
    assert "2 users with fewer than 3 events" in text
    shown = {line[:24].strip(): line[24:].strip() for line in text.splitlines()[1:] if "note:" not in line}
    sizes = {"training users": "4", "training events": "6", "validation targets": "2", "test targets": "2"}
    assert sizes.items() <= shown.items() and shown["users"] == "4" and shown["mean length"] == "2.5"
    assert "training users" not in describe(data)


def test_leave_one_out_needs_someone_to_evaluate(tmp_path):
    with pytest.raises(DataError, match="no user has 3 events"):
        leave_one_out(read_data(folder_with(tmp_path, HEADER + "a,1,1\na,2,2\n")))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=60))
def test_every_event_is_in_exactly_one_part(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("data")
    data = read_data(folder_with(folder, HEADER + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows)))
    for user in {u for u, _, _ in rows}:
        expected = [f"i{i}" for _, i, _ in sorted((r for r in rows if r[0] == user), key=lambda r: r[2])]
        assert ids_of(data, f"u{user}") == expected
    if np.diff(data.offsets).max() < 3:
        return
    split = leave_one_out(data)
    for position, user in enumerate(split.test_users):
        whole = data.events(user).tolist()
        train = split.train[split.train_users.tolist().index(user)].tolist()
        assert train == split.valid_history[position].tolist()
        assert [*train, split.valid_target[position]] == split.test_history[position].tolist()
        assert [*split.test_history[position], split.test_target[position]] == whole
    held_out = len(split.valid_target) + len(split.test_target)
    assert sum(map(len, split.train)) + held_out == len(rows)


def test_chronological_by_hand(tmp_path):
    events = (
        HEADER
        + "a,0,10\na,1,20\na,2,20\na,3,30\n"  # one event a part, and a tie at the border
        + "b,1,12\nb,3,35\n"  # not in the validation window
        + "c,2,31\nc,0,32\n"  # nothing before the test window
        + "d,0,5\nd,1,6\n"
    )
    data = read_data(folder_with(tmp_path, events, [{"item_id": number} for number in range(4)]))
    split = chronological(data, valid_from=20, test_from=30)
    assert [sequence.tolist() for sequence in split.train] == [[0], [1], [0, 1]]
    assert split.train_users.tolist() == [0, 1, 3]
    assert split.valid_users.tolist() == [0]
    assert [history.tolist() for history in split.valid_history] == [[0]] and split.valid_target.tolist() == [1]
    assert split.test_users.tolist() == [0, 1]
    assert [history.tolist() for history in split.test_history] == [[0, 1, 2], [1]]
    assert split.test_target.tolist() == [3, 3]
    with pytest.raises(DataError, match="0 test users"):
        chronological(data, valid_from=20, test_from=99)
    with pytest.raises(DataError, match="must be earlier"):
        chronological(data, valid_from=30, test_from=30)
    # by quantiles: four of the ten events lie before the moment of the fifth
    (moment,) = time_quantiles(data, 0.4)
    assert (data.times < moment).sum() == 4


def test_what_may_have_been_learnt_is_no_target_of_an_update(tmp_path):
    path = tmp_path / "interactions.csv"
    rows = [
        ("a", 1),
        ("a", 2),
        ("a", 3),
        ("a", 4),
        ("b", 1),
        ("b", 5),
        ("b", 6),
        ("b", 7),
        ("c", 1),
        ("c", 2),
        ("c", 3),
    ]
    path.write_text(HEADER + "".join(f"{user},i{time},{time}\n" for user, time in rows))
    data = read_data(tmp_path)
    newest = leave_one_out(data)  # validation: a 3, b 6, c 2; test: a 4, b 7, c 3
    assert learnt_until(data, newest, "leave-one-out", False, None) == {"valid": None, "test": None}
    assert learnt_until(data, newest, "leave-one-out", True, None) == {"valid": 6, "test": None}
    assert learnt_until(data, newest, "leave-one-out", False, {"valid": 9, "test": 8}) == {"valid": 9, "test": 8}
    moments = chronological(data, valid_from=3, test_from=6)  # has all that users had until 2, then a 3, b 5 and c 3
    assert learnt_until(data, moments, "chronological", False, None) == {"valid": 2, "test": 2}
    assert learnt_until(data, moments, "chronological", True, None) == {"valid": 5, "test": 5}
    left = without_learnt(data, newest, {"valid": 2, "test": 3})
    assert [history.tolist() for history in left.valid_history] == [h.tolist() for h in newest.valid_history[:2]]
    assert (
        left.valid_users.tolist() == left.test_users.tolist() == [0, 1] and left.test_target[1] == newest.test_target[1]
    )
    assert [len(sequence) for sequence in left.train] == [2, 2, 2] and [len(s) for s in newest.train] == [2, 2, 1]
    assert without_learnt(data, newest, None) is newest


def test_chronological_refuses_positions(tmp_path):
    data = read_data(folder_with(tmp_path, HEADER + "a,1,0\na,2,1\na,3,2\nb,1,0\nb,2,1\n"))
    with pytest.raises(DataError, match="positions, not moments"):
        chronological(data, 1, 2)


def test_statistics_by_hand(tmp_path):
    events = HEADER + "a,x,1\na,x,1\na,y,2\na,x,3\nb,y,3\n"
    items = [{"item_id": "x", "title": "X"}, {"item_id": "y"}, {"item_id": "z"}]
    numbers = statistics(read_data(folder_with(tmp_path, events, items)))
    assert numbers == pytest.approx(
        {
            "users": 2,
            "items": 3,
            "events": 5,
            "mean_length": 2.5,
            "median_length": 2.5,
            "max_length": 4,
            "density": 5 / 6,
            "repeat_share": 2 / 5,  # x comes twice again
            "tie_share": 1 / 3,  # three steps within users, one at one time
            "items_without_events": 1,
            "users_below_3_events": 1,
            "items_with_title": 1,
        }
    )


def test_given_ids(tmp_path):
    items = read_data(folder_with(tmp_path, HEADER + "u,a,1\nu,b,2\n", [{"item_id": "b"}, {"item_id": "a"}])).items

    def load(content: dict) -> np.ndarray:
        path = tmp_path / "ids.json.gz"
        path.write_bytes(gzip.compress(json.dumps(content).encode()))
        given = load_given_ids(path, items)
        assert not given.shared_codebook and sum(given.skipped.values()) == len(content) - 2
        return given.codes

    codes = load({"a": ["<a_1>", "<b_20>"], "b": ["<a_3>", "<b_4>"], "not ours": [1]})
    assert codes.dtype == np.int64 and codes.tolist() == [[3, 4], [1, 20]]  # in the order of the items
    assert load({"a": [1, 2], "b": [3, 4]}).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(DataError, match="'a' has no codes"):
        load({"b": [1, 2]})
    with pytest.raises(DataError, match="'a' has 1 codes, others have 2"):
        load({"b": [1, 2], "a": [1]})
    for code in ("<x>", -3, "-3", 1.5, 1.0, "1.5", 1e30, True, None, [1], {"1": 1}):
        with pytest.raises(DataError, match=r"item 'a' has the code .*; write codes as whole numbers from 0"):
            load({"b": [0], "a": [code]})
    with pytest.raises(DataError, match="one name per level"):
        load({"b": ["<a_1>"], "a": ["<b_1>"]})
    (tmp_path / "ids.json").write_text(json.dumps({"a": ["<T_7>", "<T_2>"], "b": ["<T_3>", "<T_4>"]}))
    given = load_given_ids(tmp_path / "ids.json", items)
    assert given.shared_codebook and given.codes.tolist() == [[3, 4], [7, 2]]  # one name for all levels: one codebook
    with pytest.raises(DataError, match=r"there is no .*mine\.json; .* given_ids"):
        load_given_ids(tmp_path / "mine.json", items)
    with pytest.raises(DataError, match="a code above 1,000,000"):
        load({"b": [1, 2], "a": [1, 10**30]})
    (tmp_path / "ids.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_given_ids(tmp_path / "ids.json", items)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize(("name", "size"), [("office2014", (4905, 2420, 53258)), ("ml100k", (943, 1682, 100_000))])
def test_real_data(name, size):
    data = read_data(REAL / name)
    numbers = statistics(data)
    assert (numbers["users"], numbers["items"], numbers["events"]) == size
    split = leave_one_out(data)
    assert len(split.test_target) == size[0]
    assert sum(map(len, split.train)) == size[2] - 2 * size[0]
