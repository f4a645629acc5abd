"""Values by row: a list, or a column of an Arrow table in a mapped file, which processes share.

A list of a million strings takes every process 70 MB and a second to make. A mapped column takes nothing and is open at
once, but to read a value takes ten times as long: a third of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa

T = TypeVar("T")


class MappedColumn(Generic[T]):
    """stored: the column in the file. read: gives the value in one of its rows. What is added or changed is kept
    besides. Read on any thread, changed on one."""

    def __init__(self, stored: pa.Array, read: Callable[[int], T]) -> None:
        self.stored, self._read = stored, read
        self._stored_rows = self._rows = len(stored)
        self._changed: dict[int, T] = {}

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[T]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> T:
        if row in self._changed:
            return self._changed[row]
        if not 0 <= row < self._stored_rows:
            raise IndexError(f"there is no row {row}")
        return self._read(row)

    def __setitem__(self, row: int, value: T) -> None:
        self._changed[row] = value

    def append(self, value: T) -> None:
        self._changed[self._rows] = value
        self._rows += 1  # last: from here on it is found


Column: TypeAlias = list[T] | MappedColumn[T]


def packed(table: pa.Table) -> pa.Table:
    """The table with its strings and lists of strings as `column_of` reads them in place, in one chunk."""
    return pa.table({name: _packed(table[name]) for name in table.column_names})


def stored_lists(column: Column[list[str]]) -> pa.ListArray:
    """Packed lists of strings, of a column in which nothing has changed since it was read."""
    return column.stored if isinstance(column, MappedColumn) else _packed_lists(pa.array(column, pa.list_(pa.string())))


def column_of(values: pa.ChunkedArray) -> Column[Any]:
    """Strings or lists of strings by row: in place if they are packed, otherwise a list. An absent list is empty."""
    stored = array_of(values)
    if pa.types.is_large_string(stored.type):
        return MappedColumn(stored, _text_reader(stored))
    if not pa.types.is_list(stored.type):
        return stored.to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_dictionary(stored.type.value_type):
        return MappedColumn(stored, _list_reader(stored))
    return [names or [] for names in stored.to_pylist()]


def array_of(values: pa.ChunkedArray) -> pa.Array:
    """A single chunk as it is, which `combine_chunks` would copy."""
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()


def _packed(values: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_string(values.type):
        return values.cast(pa.large_string()).combine_chunks()  # whose texts may be more than 2 GiB together
    values = values.combine_chunks()
    if pa.types.is_list(values.type) and pa.types.is_string(values.type.value_type):
        return _packed_lists(values)
    return values


def _packed_lists(lists: pa.ListArray) -> pa.ListArray:
    """As lists of codes of the distinct strings; what was null is empty."""
    return pa.ListArray.from_arrays(lists.offsets, lists.values.dictionary_encode())


def _text_reader(stored: pa.LargeStringArray) -> Callable[[int], str | None]:
    """Reads UTF-8 from the buffers themselves: by way of a scalar of pyarrow it takes four times as long."""
    is_valid, offsets, data = (memoryview(buffer or b"").cast("B") for buffer in stored.buffers())
    begin = offsets.cast("q")

    def read(row: int) -> str:
        return str(data[begin[row] : begin[row + 1]], "utf-8")

    if not stored.null_count:
        return read
    return lambda row: read(row) if is_valid[row >> 3] >> (row & 7) & 1 else None


def _list_reader(stored: pa.ListArray) -> Callable[[int], list[str]]:
    names = stored.values.dictionary.to_pylist()
    begin, code = (memoryview(array.to_numpy()) for array in (stored.offsets, stored.values.indices))
    return lambda row: [names[each] for each in code[begin[row] : begin[row + 1]]]
