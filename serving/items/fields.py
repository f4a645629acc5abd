"""What is known of items, by field: numbers, strings, true and false, times, and lists of strings, as columns.

A value's type is its own: a field may be a number for one item and a string for another. A string in the form of an
ISO 8601 date or date with time (`2026-11-29`, `2026-11-29T08:30:00Z`; UTC unless it says otherwise) is a time.
Read on any thread, changed on one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from serving.items.field_index import ColumnKind, FieldIndex, Indexes, Key
from serving.items.labels import Labels
from serving.items.order import BY_ROW, Order
from serving.items.value_index import ROW_BYTES

Value = str | float | bool | Sequence[str]

EARLY_BYTES = 256 << 20  # of indexes that no filter has asked for yet: nine fields of a million items
NO_FIELDS: Mapping[str, Value] = {}
EARLIEST = datetime.min.replace(tzinfo=UTC).timestamp()  # of the times that can be written
LATEST = math.nextafter(datetime.max.replace(tzinfo=UTC).timestamp(), 0.0)  # the year 10000 begins with the next number
MAX_FIELDS = 256  # of different names, in one catalogue: each is a column of all items
_TIME = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)


def to_seconds(time: datetime) -> float | None:
    """A time with a zone in seconds since 1970; None if it cannot be written in UTC again: near the calendar's ends a
    zone, or the 30 us that such numbers are apart, leads beyond them."""
    seconds = time.timestamp()
    return seconds if EARLIEST <= seconds <= LATEST else None


def to_datetime(seconds: float) -> datetime:
    """In UTC. The nearest in the calendar: earlier versions have stored times beyond its ends."""
    return datetime.fromtimestamp(min(max(seconds, EARLIEST), LATEST), UTC)


def to_time(text: str) -> float | None:
    """The seconds since 1970 that a string stands for; None if it is no time."""
    if not _TIME.fullmatch(text):
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return to_seconds(time if time.tzinfo else time.replace(tzinfo=UTC))


def from_time(seconds: float) -> str:
    return to_datetime(seconds).isoformat().replace("+00:00", "Z")


class Strings:
    """codes: (capacity,) int32 by position, -1 for none. numbers: the code of every string, and of true and false."""

    def __init__(self, codes: np.ndarray, values: Sequence[str | bool] = ()) -> None:
        self.codes, self.values = codes, list(values)
        self.numbers = {value: code for code, value in enumerate(values)}

    def code(self, value: str | bool) -> int:
        """The code of a value, which gets one if it has none."""
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            self.values.append(value)
        return self.numbers[value]


class Fields:
    """Columns by the name of their field, for items up to a capacity that grows. NaN: no number, no time.

    order: of the items in every column, at first that of their rows.
    """

    def __init__(self) -> None:
        self.order = BY_ROW
        self.numbers: dict[str, np.ndarray] = {}
        self.times: dict[str, np.ndarray] = {}  # seconds since 1970
        self.strings: dict[str, Strings] = {}
        self.lists: dict[str, Labels] = {}
        self.capacity = 0
        self.indexes = Indexes()

    @property
    def names(self) -> set[str]:
        return {*self.numbers, *self.times, *self.strings, *self.lists}

    def arrange(self, order: Order) -> None:
        """Takes on another order, before anything changes and anyone reads."""
        self.order = order
        codes = [strings.codes for strings in self.strings.values()]
        for column in (*self.numbers.values(), *self.times.values(), *codes):
            column[:] = order.by_position(column)
        for labels in self.lists.values():
            labels.arrange(order)

    def of(self, row: int) -> dict[str, Value]:
        """All that is known of an item, by the names in their order; times in UTC."""
        found: dict[str, Value] = {}
        position = self.order.position(row)
        for name, number in self.numbers.items():
            if not np.isnan(value := float(number[position])):
                found[name] = int(value) if value.is_integer() else value
        for name, time in self.times.items():
            if not np.isnan(time[position]):
                found[name] = from_time(float(time[position]))
        for name, strings in self.strings.items():
            if (code := strings.codes[position]) >= 0:
                found[name] = strings.values[code]
        for name, labels in self.lists.items():
            if names := labels.of(row):
                found[name] = list(names)
        return dict(sorted(found.items()))

    def column(self, field: str, kind: ColumnKind) -> np.ndarray | None:
        """A field's numbers, its times or the codes of its strings; None if no item has any. Shape: (capacity,)."""
        if kind == "string":
            return self.strings[field].codes if field in self.strings else None
        return (self.numbers if kind == "number" else self.times).get(field)

    def index(self, keys: Iterable[Key], count: int) -> FieldIndex:
        """An index of the first `count` items, all but a few, and in time of these columns, see `Indexes`."""
        return self.indexes.index(keys, count, self.column)

    def index_early(self, count: int) -> None:
        """Begins to index all columns, if that takes no more than EARLY_BYTES. If it does, each is once a filter names
        it."""
        keys: list[Key] = [(name, "number") for name in self.numbers]
        keys += [(name, "time") for name in self.times] + [(name, "string") for name in self.strings]
        if keys and ROW_BYTES * count * len(keys) <= EARLY_BYTES:
            self.index(keys, count)

    def put(self, row: int, values: Mapping[str, Value]) -> None:
        """Gives an item these values, in place of all it had. An empty list is no value."""
        numbers: dict[str, float] = {}
        times: dict[str, float] = {}
        strings: dict[str, str | bool] = {}
        lists: dict[str, Sequence[str]] = {}
        position = self.order.position(row)
        for name, value in values.items():
            if isinstance(value, bool):
                strings[name] = value
            elif isinstance(value, int | float):
                numbers[name] = value
            elif not isinstance(value, str):
                lists[name] = value
            elif (time := to_time(value)) is not None:
                times[name] = time
            else:
                strings[name] = value
        for columns, given in ((self.numbers, numbers), (self.times, times)):
            for name in given.keys() - columns.keys():
                columns[name] = np.full(self.capacity, np.nan)
            for name, column in columns.items():
                column[position] = given.get(name, np.nan)
        for name in strings.keys() - self.strings.keys():
            self.strings[name] = Strings(np.full(self.capacity, -1, np.int32))
        for name, known in self.strings.items():
            known.codes[position] = known.code(strings[name]) if name in strings else -1
        for name in lists.keys() - self.lists.keys():
            self.lists[name] = Labels([])
            self.lists[name].arrange(self.order)
        for name, labels in self.lists.items():
            labels.put(row, lists.get(name, ()))
        self.indexes.changed(position)  # last: one that is made in the meantime may have read what was here before

    def reserve(self, rows: int) -> None:
        """Makes room for so many rows."""
        if rows <= self.capacity:
            return
        self.capacity = max(rows, 2 * self.capacity)

        def longer(column: np.ndarray, missing: float) -> np.ndarray:
            return np.concatenate([column, np.full(self.capacity - len(column), missing, column.dtype)])

        for columns in (self.numbers, self.times):
            for name, column in columns.items():
                columns[name] = longer(column, np.nan)
        for strings in self.strings.values():
            strings.codes = longer(strings.codes, -1)
