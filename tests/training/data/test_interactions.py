"""The table of events in every form that people have it, and one sentence with file and row for what cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.types import MAX_ID_LENGTH
from training.data.errors import DataError
from training.data.interactions import find_interactions, read_interactions
from training.data.read import read_data

HEADER = "user_id,item_id,timestamp\n"


def events(path: Path) -> list[tuple[str, str, float]]:
    read = read_interactions(path)
    return list(zip(read.users.to_pylist(), read.items.to_pylist(), read.times.values.tolist(), strict=True))


def written(folder: Path, content: str | bytes, name: str = "interactions.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_interactions(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    "content",
    [
        "user_id\titem_id\ttimestamp\nu\ta\t1\nv\tb\t2\n",
        "user_id;item_id;timestamp\nu;a;1\nv;b;2\n",
        "user_id|item_id|timestamp\nu|a|1\nv|b|2\n",
        "user_id:token,item_id:token,timestamp:float\nu,a,1\nv,b,2\n",
        "\ufeffuser_id,item_id,timestamp\r\nu,a,1\r\n\r\nv,b,2",
        '"item_id","timestamp","user_id"\n"a","1","u"\n"b","2","v"\n',
        "user_id,item_id,timestamp,x,x\nu,a,1,,\nv,b,2,,\n",
        b"user_id,item_id,timestamp,title\nu,a,1,caf\xe9\nv,b,2,\"caf\xe9\"\n",  # of no interest, so of any encoding
        "user_id,item_id,timestamp,title\nu,a,1,5\" pipe\nv,b,2,\"5\"\" pipe\"\n",
        'user_id,item_id,timestamp,review\nu,a,1,"Well.\nSize, 10, fits, thanks\n\nEnd"\nv,b,2,"a, b"\n',
    ],
)  # fmt: skip
def test_separators_types_and_quotes_in_use_are_read(tmp_path, content):
    assert events(written(tmp_path, content)) == [("u", "a", 1), ("v", "b", 2)]


def test_recboles_files_are_read_as_they_are(tmp_path):
    written(
        tmp_path, "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t02\t5\t8\n1\t3\t5\t7\n", "ml.inter"
    )
    written(tmp_path, "item_id:token\ttitle:token_seq\n02\tx\n", "ml.item")
    data = read_data(tmp_path)
    assert [data.items.item_ids[item] for item in data.events(0)] == ["3", "02"]
    assert any(".item" in note for note in data.skipped)
    written(tmp_path, "", "other.inter")
    with pytest.raises(DataError, match=r"ml\.inter and other\.inter; keep one"):
        find_interactions(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_larger_than_a_block_with_line_breaks_and_long_fields_is_read(tmp_path, packed):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["user_id", "item_id", "timestamp", "review"])
    for row in range(20_000):
        writer.writerow([f"u{row % 50}", f"i{row % 30}", row, "It came on Monday.\nWorks, mostly.\n\nWould buy again."])
    writer.writerow(["u", "i", 20_000, "word " * 400_000])  # longer than a block itself
    content = file.getvalue().encode()
    assert len(content) > 3 << 20
    path = written(tmp_path, gzip.compress(content, 1) if packed else content, f"interactions.csv{'.gz' * packed}")
    read = read_interactions(path)
    assert read.times.values.tolist() == list(range(20_001)) and read.users[-1].as_py() == "u"


def test_a_forgotten_quote_is_an_error_with_the_row_wherever_the_next_one_is(tmp_path):
    def table(**cells: str) -> Path:
        rows = [f"u{row},i{row},{row},{cells.get(f'row{row}', 'x')}\n" for row in range(1, 200)]
        return written(tmp_path, "user_id,item_id,timestamp,title\n" + "".join(rows))

    assert len(events(table(row7='12" disc'))) == 199
    assert "row 7: a quote opens a field and is not closed" in refused(table(row7='"12 inch'))
    assert "row 7: a quote opens a field and is not closed" in refused(table(row7='"12 inch', row9='"14 inch'))
    assert "row 7: a quote opens a field and is not closed" in refused(table(row7='"12 inch', row9='"good"'))
    assert "row 7: a quote opens a field and is not closed" in refused(table(row7='"12" disc'))
    assert "row 7: a quoted field goes on over lines that look like rows" in refused(table(row7='"12 inch', row9='14"'))
    assert "row 199: a quote opens" in refused(table(row199='"x'))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("user_id, item_id, timestamp\nu, a, 1\n", "a space in the name of the column ' item_id'"),
        ("User,Item,Time\nu,a,1\n", "no column user_id but 'User,Item,Time'; name user_id,item_id,timestamp"),
        ("user_id,item_id,timestamp,item_id\nu,a,1,b\n", "2 columns named item_id; keep one"),
        ((HEADER + "u,a,1\n").encode("utf-16"), "UTF-16; write it again as UTF-8"),
        (gzip.compress(b"x", mtime=0), "packed with gzip; name it interactions.csv.gz"),
        (HEADER.encode() + b"u,a,1\nu,caf\xe9,2\n", "row 2: item_id is not UTF-8"),
        (HEADER.encode() + b"u,a,1\n" + b"\0" * 50, "row 2: 1 fields where the header has 3"),
        (HEADER + f"u,a,1\nu,{'x' * (MAX_ID_LENGTH + 1)},2\n", "row 2: item_id has 257 characters"),
        (HEADER.strip(), "no data rows"),
        (HEADER + "u,a,1\nu,b, \n", "row 2: the time is empty"),
        (HEADER + "u,a,1\nu,b,1e999\n", "row 2: '1e999' is not a time"),
        (HEADER + f"u,a,1\nu,b,{'9' * 5000}\n", "row 2: '99999"),
        (HEADER + "u,a,1.5\nu,b,nan\n", "row 2: 'nan' is not a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_exactly(tmp_path, content, words):
    assert words in refused(written(tmp_path, content))


def test_the_longest_id_is_counted_in_characters(tmp_path):
    assert len(events(written(tmp_path, HEADER + f"u,{'é' * MAX_ID_LENGTH},1\n"))) == 1


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("9007199254740992", "9007199254740993"),  # equal in float64
        ("-2", "-1"),
        ("9223372036854775808", "9223372036854775809"),
        ("99999999999999999999999999999999999990", "99999999999999999999999999999999999991"),
        ("1700000000.123456788", "1700000000.123456789"),
        ("1", "+2"),
        ("5", "5.5"),
        ("2024-01-01T01:00:00.123456788+01:00", "2024-01-01T00:00:00.123456789Z"),
        ("2024-01-01", "2024-01-01T00:00:00.000000001"),
        ("1969-12-31T23:59:59.9", "1970-01-01 00:00:00"),
        ("20240101T230000", "2024-01-01T23:00:00-05:00"),
    ],
)
def test_the_order_of_times_is_exact(tmp_path, early, late):
    order = read_interactions(written(tmp_path, HEADER + f"u,b,{late}\nu,a,{early}\nu,c,{late}\n")).times.order
    assert order[1] < order[0] == order[2]


def test_whole_numbers_stay_whole(tmp_path):
    values = read_interactions(written(tmp_path, HEADER + "u,a,1700000000000000001\n")).times.values
    assert values.dtype == np.int64 and values.tolist() == [1700000000000000001]
    values = read_interactions(written(tmp_path, HEADER + f"u,a,{2**64 - 1}\n")).times.values
    assert values.dtype == np.uint64 and values.tolist() == [2**64 - 1]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.large_string(),
        pa.binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.int64(),
        pa.uint8(),
    ],
)
def test_every_kind_of_text_in_parquet_is_read(tmp_path, kind):
    column = pa.array(["7", "8"]).cast(kind)
    path = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": column, "item_id": column, "timestamp_or_order": column}), path)
    assert events(path) == [("7", "7", 7), ("8", "8", 8)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([2, 1], pa.uint64()),
        pa.array([1700000000000000002, 1700000000000000001], pa.timestamp("ns")),
        pa.array([2, 1], pa.timestamp("us", "Europe/Berlin")),
        pa.array([2, 1], pa.date32()),
        pa.array([Decimal("2.50"), Decimal("1.25")]),
        pa.array([2.5, 1.5], pa.float32()),
    ],
)
def test_times_of_parquet_keep_their_order(tmp_path, times):
    path = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": ["u", "u"], "item_id": ["b", "a"], "timestamp": times}), path)
    order = read_interactions(path).times.order
    assert order[1] < order[0]


def test_types_and_values_are_read_where_there_are_some(tmp_path):
    csv_file = written(tmp_path, "value,user_id,type,item_id,timestamp\n2.5,u,view,a,1\n,v,,b,2\n")
    parquet = tmp_path / "interactions.parquet"
    columns = {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1, 2]}
    pq.write_table(pa.table(columns | {"type": pa.array(["view", None]), "value": [2.5, None]}), parquet)
    for path in (csv_file, parquet):
        read = read_interactions(path)
        assert read.types.to_pylist() == ["view", None] and read.values.to_pylist() == [2.5, None]
        second = read.filter(pa.chunked_array([[False, True]]))
        assert (second.types.to_pylist(), second.values.to_pylist()) == ([None], [None])
    pq.write_table(pa.table(columns), parquet)
    assert read_interactions(parquet).types is read_interactions(parquet).values is None


def test_a_column_of_too_many_types_is_no_column_of_types(tmp_path):
    rows = "".join(f"u,a,{number},order {number}\n" for number in range(101))
    assert "101 types of events" in refused(written(tmp_path, "user_id,item_id,timestamp,type\n" + rows))


def test_parquet_that_cannot_be_read_is_said_exactly(tmp_path):
    path = tmp_path / "interactions.parquet"
    good = {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1, 2]}
    bad_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    for columns, words in (
        ({"user_id": [0.5, 1.0]}, "column user_id is double; store ids as strings"),
        ({"item_id": ["a", None]}, "row 2: item_id is empty"),
        ({"item_id": bad_text}, "row 2: item_id is not UTF-8"),
        ({"item_id": [b"a", b"\xff"]}, "row 2: item_id is not UTF-8"),
        ({"type": [0.5, 1.0]}, "column type is double; store types as strings"),
        ({"type": ["view", b"\xff"]}, "row 2: type is not UTF-8"),
        ({"type": ["view", "x" * 65]}, "row 2: type has more than 64 characters"),
        ({"value": [1.0, float("nan")]}, "row 2: the value is not a finite number"),
        ({"value": ["1", "much"]}, "not every value is a number"),
        ({"timestamp": [1, None]}, "row 2: the time is empty"),
        ({"timestamp": [1.0, float("inf")]}, "row 2: inf is not a time"),
        ({"timestamp": [[1], [2]]}, "the times are list"),
    ):
        pq.write_table(pa.table(good | columns), path)
        assert words in refused(path)
    pq.write_table(pa.table([["u"], ["u"], ["a"], [1]], names=["user_id", "user_id", "item_id", "timestamp"]), path)
    assert "2 columns named user_id" in refused(path)
