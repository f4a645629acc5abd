"""Indexes of the fields of items, made on a thread of their own. Rows are those of the columns, see `Fields.order`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from serving.items.value_index import ValueIndex

MANY_CHANGED = 64  # items that an index does not know; of a large catalogue, a thousandth
TOO_MANY_CHANGED = 8  # times as many
ColumnKind = Literal["number", "time", "string"]
Key = tuple[str, ColumnKind]  # of a column: its field, and what it has of it
Columns = Callable[[str, ColumnKind], np.ndarray | None]


class FieldIndex:
    """Knows the first `rows` items, in masks of (rows / 8,) uint8, see `ValueIndex`. Read on any thread.

    changed: rows whose values have changed since it was made. For these, and behind its end, the answer is undefined.
    columns: those that are indexed by now.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.bytes = rows, -(-rows // 8)
        self.changed: dict[int, None] = {}
        self.columns: dict[Key, ValueIndex] = {}

    def outdated(self, count: int) -> np.ndarray:
        """Which of the first `count` rows it does not know as they are. Shape: (n,) int64."""
        changed = np.sort(np.array(list(self.changed), np.int64))
        return np.concatenate([changed[changed < min(count, self.rows)], np.arange(self.rows, count)])

    def knows_all_but(self, times: int, count: int) -> bool:
        """Whether it knows the first `count` items, all but that many times a few."""
        return len(self.changed) + count - self.rows <= times * max(MANY_CHANGED, count // 1000)


class Indexes:
    """The index that filters read and, while that is replaced, the one that is being made. Used on any thread.

    Changes are reported after they are made, to both, and a column is copied after its index hears of changes: so
    what a copy has missed is among `changed`.
    """

    def __init__(self) -> None:
        self._indexes: tuple[FieldIndex, ...] = ()  # in use, then in the making
        self._named: dict[Key, None] = {}  # the columns that have been asked for
        self._maker: threading.Thread | None = None
        self._lock = threading.Lock()  # guards these

    def changed(self, row: int) -> None:
        """A row has got other values."""
        for index in self._indexes:
            index.changed[row] = None

    def index(self, keys: Iterable[Key], count: int, columns: Columns) -> FieldIndex:
        """One that knows all but a few of the first `count` items. It may lack any column; those of `keys` that exist
        it has later on."""
        with self._lock:
            self._named.update((key, None) for key in keys if columns(*key) is not None)
            if not self._indexes or len(self._indexes) == 1 and not self._indexes[0].knows_all_but(1, count):
                self._indexes += (FieldIndex(count),)
            if self._missing() is None:
                self._indexes = self._indexes[-1:]
            elif self._maker is None or not self._maker.is_alive():
                self._maker = threading.Thread(target=self._make, args=[columns], name="field index", daemon=True)
                self._maker.start()
            in_use, newest = self._indexes[0], self._indexes[-1]
            return in_use if in_use.knows_all_but(TOO_MANY_CHANGED, count) else newest

    def wait(self) -> None:
        """Returns once nothing is in the making."""
        if (maker := self._maker) is not None:
            maker.join()

    def _missing(self) -> Key | None:
        return next((key for key in self._named if key not in self._indexes[-1].columns), None)

    def _make(self, columns: Columns) -> None:
        """Makes what is missing, a column at a time."""
        while True:
            with self._lock:
                index, key = self._indexes[-1], self._missing()
                if key is None:
                    self._indexes, self._maker = (index,), None
                    return
            column = columns(*key)
            assert column is not None  # for columns are never dropped
            index.columns[key] = ValueIndex(column[: index.rows].copy())  # as it is now, whoever changes it
