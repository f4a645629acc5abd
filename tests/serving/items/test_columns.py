"""Columns in a mapped file: they read like lists, take additions and changes, and other processes share their pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.columns import Column, MappedColumn, column_of, packed, stored_lists
from serving.items.row_index import RowIndex, hash_ids

texts = st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=3), max_size=9)
lists = st.lists(st.lists(st.sampled_from("abc"), max_size=3), max_size=9)


def mapped(values: list[str | None] | list[list[str]], type_: pa.DataType, path: Path) -> Column[object]:
    table = packed(pa.table({"values": pa.array(values, type_)}))
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    column = column_of(pa.ipc.open_file(pa.memory_map(str(path))).read_all()["values"])
    assert isinstance(column, MappedColumn) or not values  # a file of no rows has no chunk to map
    return column


@settings(max_examples=50, deadline=None)
@given(values=texts)
def test_strings_are_read_in_place(values: list[str | None], tmp_path_factory: pytest.TempPathFactory) -> None:
    column = mapped(values, pa.string(), tmp_path_factory.getbasetemp() / "texts.arrow")
    assert list(column) == values == [column[row] for row in range(len(column))]


@settings(max_examples=50, deadline=None)
@given(values=lists)
def test_lists_of_strings_are_read_in_place(values: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    column = mapped(values, pa.list_(pa.string()), tmp_path_factory.getbasetemp() / "lists.arrow")
    assert list(column) == values
    assert stored_lists(column).to_pylist() == stored_lists(values).to_pylist() == values  # type: ignore[arg-type]


def test_a_mapped_column_is_added_to_and_changed_like_a_list(tmp_path: Path) -> None:
    values: list[str | None] = ["a", None, "c"]
    column = mapped(values, pa.string(), tmp_path / "texts.arrow")
    for each in (values, column):
        each.append("d")
        each[1], each[3] = "b", None
    assert list(column) == values == ["a", "b", "c", None] and len(column) == 4
    for row in (-1, 4):
        with pytest.raises(IndexError):
            column[row]


def test_what_is_mapped_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    column = mapped([f"item {row}" for row in range(100_000)], pa.string(), tmp_path / "texts.arrow")
    assert column[99_999] == "item 99999"
    assert pa.total_allocated_bytes() - before < 10_000  # of 1.9 MB


@settings(deadline=None)
@given(item_ids=st.lists(st.text(max_size=2), unique=True, min_size=1, max_size=30), asked=st.text(max_size=2))
def test_ids_are_found_as_in_a_dict(item_ids: list[str], asked: str) -> None:
    index, known = RowIndex(list(item_ids), *hash_ids(item_ids)), dict(zip(item_ids, range(30), strict=False))
    assert [index.get(each) for each in item_ids] == list(known.values())
    assert index.get(asked) == known.get(asked)
    index["a new one"] = 30
    assert index.get("a new one") == 30


def test_ids_with_one_hash_are_told_apart() -> None:
    item_ids = ["plumless", "buckeroo", "another"]  # the first two have one CRC-32
    hashes, rows = hash_ids(item_ids)
    assert len(np.unique(hashes)) == 2
    index = RowIndex(item_ids, hashes, rows)
    assert [index.get(each) for each in item_ids] == [0, 1, 2]
    assert index.get("\ud800") is None  # JSON can say it, UTF-8 cannot
