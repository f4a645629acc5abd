"""Histories in a file, Parquet or JSON lines: user_id and history (item ids and events, oldest first), in parts.

A part is a range of rows that is read, scored and written as one. Its rows depend on the file and the requested size
alone, so that a later run finds the same parts. No more than one part is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import ScoreError
from serving.ids import event_values, id_fault, id_values, is_event_list_type, is_id_list_type, is_id_type
from serving.items.events import to_event
from serving.types import MAX_ID_LENGTH, Event

COLUMNS = ["user_id", "history"]
CHANGED = "{} has changed since this run began; run the command again."


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
    """row: the row's number in the file, from 1. history: item ids and events, oldest first."""

    row: int
    user_id: str
    history: list[str | Event]


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
        lines = [line.strip() for line in islice(file, 100)]
        if any(lines) and not any(_object(line) is not None for line in chain(lines, file)):
            raise ScoreError(
                f'{path} is neither Parquet nor JSON lines such as {{"user_id": "u1", "history": ["i1"]}} in UTF-8.'
            )
    return JsonHistories(path, part_rows)


class ParquetHistories:
    """A part never spans two row groups."""

    def __init__(self, path: Path, part_rows: int) -> None:
        self.path, self.part_rows = path, part_rows
        try:
            # Buffered and not read ahead: a whole row group, a million rows, would be in memory otherwise.
            self.file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise ScoreError(f"{path} is damaged ({str(error).splitlines()[0]}); write it again.") from error
        schema = self.file.schema_arrow
        for name in COLUMNS:
            if (count := schema.names.count(name)) != 1:
                found = f"{count} columns named" if count else "no column"
                raise ScoreError(f"{path} has {found} {name}; it needs user_id and history, a list of item ids.")
        history, user = schema.field("history").type, schema.field("user_id").type
        if not is_id_list_type(history) and not is_event_list_type(history):
            raise ScoreError(f"{path}: history must be lists of item ids, or of events with an item_id, not {history}.")
        if not is_id_type(user):
            raise ScoreError(f"{path}: user_id must be strings, not {user}.")
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
        try:
            batch = self._batch(part)
        except (pa.ArrowException, OSError) as error:
            raise ScoreError(f"{self.path} is damaged ({str(error).splitlines()[0]}); write it again.") from error
        users = id_values(batch.column("user_id"), pa.string())
        history = batch.column("history")
        are_ids = is_id_list_type(history.type)
        histories = id_values(history, pa.list_(pa.string())) if are_ids else event_values(history)
        return [
            _checked(part.first_row + i + 1, user, history)
            for i, (user, history) in enumerate(zip(users, histories, strict=True))
        ]

    def _batch(self, part: Part) -> pa.RecordBatch:
        group, done = self.cursor
        if group != part.group or done > part.offset:
            self.batches, done = self.file.iter_batches(self.part_rows, [part.group], COLUMNS), 0
        batch = None
        for batch in self.batches:  # skips parts that an earlier run or another worker has scored
            done += len(batch)
            if done > part.offset:
                break
        self.cursor = (part.group, done)
        if batch is None or done != part.offset + part.rows:
            raise ScoreError(CHANGED.format(self.path))
        return batch


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
                if not text:
                    raise ScoreError(CHANGED.format(self.path))
                if text.strip():
                    found.append(_parsed(number, text))
        return found


def _object(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None where it holds none. A line of the file's first may begin with a byte order mark."""
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _parsed(row: int, line: bytes) -> User | Reject:
    data = _object(line)
    if data is None:
        return Reject(row, None, "the line is not JSON, or not an object with user_id and history")
    return _checked(row, data.get("user_id"), data.get("history"))


def _checked(row: int, user: Any, history: Any) -> User | Reject:
    """Ids are strings, whatever they look like: numbers are converted."""
    if fault := id_fault(user):
        return Reject(row, str(user)[:MAX_ID_LENGTH] if isinstance(user, str) else None, f"user_id {fault}")
    if not isinstance(history, list):
        return Reject(row, str(user), "history is missing or not a list of item ids")
    entries: list[str | Event] = []
    for index, item in enumerate(history):
        if isinstance(item, dict):
            try:
                entries.append(to_event(item))
            except ValueError as error:
                return Reject(row, str(user), f"event {index + 1} of the history {error}")
            continue
        if fault := id_fault(item):
            return Reject(row, str(user), f"item {index + 1} of the history {fault}, so it is not an item id")
        entries.append(str(item))
    return User(row, str(user), entries)
