"""Names by row, such as items' categories, and rows by name. Read on any thread, changed on one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from serving.items.columns import Column, stored_lists

NO_ROWS = np.empty(0, np.int64)


class Labels:
    """by_row: the names of each row; rows behind its end have none. names: all that any row has had."""

    def __init__(self, by_row: Column[list[str]]) -> None:
        self.by_row = by_row
        self._rows = _rows_by_name(stored_lists(by_row))
        self._changed: dict[str, dict[int, bool]] = {}  # not yet in _rows
        self._lock = threading.Lock()  # guards these two
        self.names = frozenset(self._rows)

    def of(self, row: int) -> Sequence[str]:
        return self.by_row[row] if row < len(self.by_row) else ()

    def rows(self, name: str) -> np.ndarray:
        """The rows that have a name. Shape: (n,) int32 or int64, ascending."""
        with self._lock:
            changed = self._changed.pop(name, None)
            if changed:
                self._rows[name] = _changed(self._rows[name], changed)
            return self._rows.get(name, NO_ROWS)

    def put(self, row: int, names: Sequence[str]) -> None:
        """Gives a row these names, in place of those it had."""
        while len(self.by_row) <= row:
            self.by_row.append([])
        before, after = set(self.by_row[row]), set(names)
        self.by_row[row] = list(dict.fromkeys(names))
        with self._lock:
            for name in before ^ after:
                self._changed.setdefault(name, {})[row] = name in after
                self._rows.setdefault(name, NO_ROWS)
            self.names = frozenset(self._rows)


def are_in(ascending: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which rows are among others. Shape: (n,) -> (n,) bool."""
    if not len(ascending):
        return np.zeros(len(rows), bool)
    found: np.ndarray = ascending.take(np.searchsorted(ascending, rows), mode="clip") == rows
    return found


def _changed(ascending: np.ndarray, changed: dict[int, bool]) -> np.ndarray:
    """With some rows taken out or put in. To sort a million rows anew takes hundreds of times as long."""
    rows = np.sort(np.array(list(changed), np.int64))
    others = np.delete(ascending, np.searchsorted(ascending, rows[are_in(ascending, rows)]))
    added = rows[[changed[row] for row in rows.tolist()]]
    after: np.ndarray = np.insert(others, np.searchsorted(others, added), added)
    return after


def _rows_by_name(by_row: pa.ListArray) -> dict[str, np.ndarray]:
    """The rows that have each name, ascending. by_row: packed. One stable sort by name: rows were in order before."""
    named = by_row.values
    name = named.indices.to_numpy()
    order = np.argsort(name, kind="stable")
    name, row = name[order], np.repeat(np.arange(len(by_row), dtype=np.int32), by_row.value_lengths().to_numpy())[order]
    is_first = np.ones(len(row), bool)  # a row may have a name twice
    is_first[1:] = (name[1:] != name[:-1]) | (row[1:] != row[:-1])
    name, row = name[is_first], row[is_first]
    begin = np.searchsorted(name, np.arange(len(named.dictionary) + 1)).tolist()
    return {text: row[begin[i] : begin[i + 1]] for i, text in enumerate(named.dictionary.to_pylist())}
