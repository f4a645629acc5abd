"""Names by row, such as items' categories, and rows by name. Read on any thread, changed on one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from serving.items.columns import Column, stored_lists
from serving.items.value_index import mask_of

NO_ROWS = np.empty(0, np.int64)
MANY_ROWS = 1 / 128  # of all: what a name has to be in for a mask of its own


class Labels:
    """by_row: the names of each row; rows behind its end have none. names: all that any row has had."""

    def __init__(self, by_row: Column[list[str]]) -> None:
        self.by_row = by_row
        self._rows = _rows_by_name(stored_lists(by_row))
        self._changed: dict[str, dict[int, bool]] = {}  # not yet in _rows
        self._masks: dict[str, np.ndarray] = {}  # of names that many rows have
        self._lock = threading.Lock()  # guards these three
        for name in self._rows:
            self._keep_mask(name)
        self.names = frozenset(self._rows)

    def of(self, row: int) -> Sequence[str]:
        return self.by_row[row] if row < len(self.by_row) else ()

    def rows(self, name: str) -> np.ndarray:
        """The rows that have a name. Shape: (n,) int32 or int64, ascending."""
        with self._lock:
            changed = self._changed.pop(name, None)
            if changed:
                self._rows[name] = _changed(self._rows[name], changed)
                self._keep_mask(name)
            return self._rows.get(name, NO_ROWS)

    def having(self, names: Iterable[str], count: int) -> np.ndarray:
        """Which of the first rows have any of these names. Shape: (count / 8,) uint8, as of `mask_of`."""
        found = np.zeros(-(-count // 8), np.uint8)
        for name in names:
            mask = self._masks.get(name)
            if mask is None:
                rows = self.rows(name)
                mask = mask_of(rows[: np.searchsorted(rows, count)], len(found))
            found[: len(mask)] |= mask[: len(found)]
        return found

    def among(self, rows: np.ndarray, names: Iterable[str]) -> np.ndarray:
        """Which of these rows have any of these names. Shape: (n,) int64 -> (n,) bool."""
        found = np.zeros(len(rows), bool)
        for name in names:
            mask = self._masks.get(name)
            if mask is None:
                found |= are_in(self.rows(name), rows)
            else:
                found |= (mask.take(rows >> 3, mode="clip") >> (rows & 7) & 1).astype(bool) & (rows < 8 * len(mask))
        return found

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
                if name in self._masks:
                    self._flip(name, row)
            self.names = frozenset(self._rows)

    def _keep_mask(self, name: str) -> None:
        """Makes the mask of a name, if it has none yet and is in many rows."""
        rows = self._rows[name]
        if name not in self._masks and len(rows) > MANY_ROWS * len(self.by_row):
            self._masks[name] = mask_of(rows, -(-len(self.by_row) // 8))

    def _flip(self, name: str, row: int) -> None:
        mask = self._masks[name]
        if row >> 3 >= len(mask):
            mask = self._masks[name] = np.pad(mask, (0, (row >> 3) + 1))
        mask[row >> 3] ^= 1 << (row & 7)


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
