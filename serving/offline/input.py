"""Histories in a file, Parquet or JSON lines: user_id and history (item ids, oldest first), read part by part.

A part is a range of rows that is read, scored and written as one. Its rows depend on the file and the requested size
alone, so that a later run finds the same parts. No more than one part is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import ScoreError

COLUMNS = ["user_id", "history"]


@dataclass(frozen=True, slots=True)
class Part:
    """`rows` rows of the file from `first_row` on (0-based).

    They begin, in Parquet, `offset` rows into row group `group`; in JSON lines, `offset` bytes into the file.
    """

    number: int
    first_row: int
    rows: int
    offset: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class User:
    """row: the row's number in the file, from 1. history: item ids, oldest first."""

    row: int
    user_id: str
    history: list[str]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be answered, and why. user_id: None if it has no readable one."""

    row: int
    user_id: str | None
    reason: str


class Histories(Protocol):
    """A file of histories. `parts` divides it; `read` reads one part, in any order, fastest in that of the file."""

    def parts(self) -> list[Part]: ...

    def read(self, part: Part) -> list[User | Reject]: ...


def open_histories(path: Path, part_rows: int) -> Histories:
    """Opens Parquet, recognised by its first bytes, or else JSON lines. Raises ScoreError if it is neither."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ScoreError(f"{path} cannot be read ({error.strerror}); use a file of histories.") from error
    if head == b"PAR1":
        return ParquetHistories(path, part_rows)
    with path.open("rb") as file:
        sample = [line for line in islice(file, 100) if line.strip()]
    if sample and not any(isinstance(_parsed(0, line), User) for line in sample):
        raise ScoreError(f'{path} is neither Parquet nor JSON lines such as {{"user_id": "u1", "history": ["i1"]}}.')
    return JsonHistories(path, part_rows)


class ParquetHistories:
    """A part never spans two row groups."""

    def __init__(self, path: Path, part_rows: int) -> None:
        self.part_rows = part_rows
        try:
            # Buffered and not read ahead: a whole row group, a million rows, would be in memory otherwise.
            self.file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise ScoreError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again.") from error
        schema = self.file.schema_arrow
        for name in COLUMNS:
            if schema.get_field_index(name) < 0:
                raise ScoreError(f"{path} has no column {name}; it needs user_id and history, a list of item ids.")
        history = schema.field("history").type
        if not (pa.types.is_list(history) or pa.types.is_large_list(history)) or not _is_id(history.value_type):
            raise ScoreError(f"{path}: history must be lists of item ids, not {history}.")
        if not _is_id(schema.field("user_id").type):
            raise ScoreError(f"{path}: user_id must be strings, not {schema.field('user_id').type}.")
        self.cursor = (-1, 0)  # row group, rows of it that `batches` has yielded
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def parts(self) -> list[Part]:
        found: list[Part] = []
        first = 0
        for group in range(self.file.num_row_groups):
            count = self.file.metadata.row_group(group).num_rows
            for offset in range(0, count, self.part_rows):
                rows = min(self.part_rows, count - offset)
                found.append(Part(len(found), first + offset, rows, offset, group))
            first += count
        return found

    def read(self, part: Part) -> list[User | Reject]:
        group, done = self.cursor
        if group != part.group or done > part.offset:
            self.batches, done = self.file.iter_batches(self.part_rows, [part.group], COLUMNS), 0
        for batch in self.batches:  # skips parts that an earlier run or another worker has scored
            done += len(batch)
            if done > part.offset:
                break
        self.cursor = (part.group, done)
        assert done == part.offset + part.rows, "Parquet was read in batches of another size"
        users = batch.column("user_id").cast(pa.string()).to_pylist()
        histories = batch.column("history").cast(pa.list_(pa.string())).to_pylist()
        return [
            _checked(part.first_row + i + 1, user, history)
            for i, (user, history) in enumerate(zip(users, histories, strict=True))
        ]


class JsonHistories:
    """One row per line that is not blank; rows are numbered by line."""

    def __init__(self, path: Path, part_rows: int) -> None:
        self.path, self.part_rows = path, part_rows

    def parts(self) -> list[Part]:
        """Here `first_row` counts all lines and `rows` only those that are not blank."""
        found: list[Part] = []
        with self.path.open("rb") as file:
            line, offset = 0, 0
            first, start, rows = 0, 0, 0
            for text in file:
                line, offset = line + 1, offset + len(text)
                rows += bool(text.strip())
                if rows == self.part_rows:
                    found.append(Part(len(found), first, rows, start))
                    first, start, rows = line, offset, 0
        return [*found, Part(len(found), first, rows, start)] if rows else found

    def read(self, part: Part) -> list[User | Reject]:
        found: list[User | Reject] = []
        with self.path.open("rb") as file:
            file.seek(part.offset)
            number = part.first_row
            while len(found) < part.rows:
                number, text = number + 1, file.readline()
                if text.strip():
                    found.append(_parsed(number, text))
        return found


def _parsed(row: int, text: bytes) -> User | Reject:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return Reject(row, None, "the line is not JSON")
    if not isinstance(data, dict):
        return Reject(row, None, "the line is not an object with user_id and history")
    return _checked(row, data.get("user_id"), data.get("history"))


def _checked(row: int, user: Any, history: Any) -> User | Reject:
    """Ids are strings, whatever they look like: numbers are converted."""
    if not _is_name(user):
        return Reject(row, None, "user_id is missing or not a string")
    if not isinstance(history, list):
        return Reject(row, str(user), "history is missing or not a list of item ids")
    if not all(_is_name(item) for item in history):
        return Reject(row, str(user), "history contains something that is not an item id")
    return User(row, str(user), [str(item) for item in history])


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))
