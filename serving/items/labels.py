"""Names by row, such as items' categories, and items by name. Read on any thread, changed on one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from serving.items.columns import Column, stored_lists
from serving.items.order import BY_ROW, Order
from serving.items.value_index import mask_of

NO_POSITIONS = np.empty(0, np.int64)
MANY_ROWS = 1 / 128  # of all: what a name has to be in for a mask of its own


class Labels:
    """by_row: the names of each row; rows behind its end have none. names: all that any row has had.

    Items of a name are given by their positions in an order, at first that of the rows.
    """

    def __init__(self, by_row: Column[list[str]]) -> None:
        self.by_row, self._order = by_row, BY_ROW
        self._positions = _rows_by_name(stored_lists(by_row))
        self._changed: dict[str, dict[int, bool]] = {}  # not yet in _positions
        self._masks: dict[str, np.ndarray] = {}  # of names that many rows have
        self._lock = threading.Lock()  # guards these three
        for name in self._positions:
            self._keep_mask(name)
        self.names = frozenset(self._positions)

    def arrange(self, order: Order) -> None:
        """Takes on another order, before anything changes and anyone reads."""
        self._order = order
        self._positions = {name: np.sort(order.positions_of(rows)) for name, rows in self._positions.items()}
        for name in self._masks:
            self._masks[name] = self._mask(name)

    def of(self, row: int) -> Sequence[str]:
        return self.by_row[row] if row < len(self.by_row) else ()

    def positions(self, name: str) -> np.ndarray:
        """Of the items that have a name. Shape: (n,) int32 or int64, ascending."""
        with self._lock:
            changed = self._changed.pop(name, None)
            if changed:
                self._positions[name] = _changed(self._positions[name], changed)
                self._keep_mask(name)
            return self._positions.get(name, NO_POSITIONS)

    def having(self, names: Iterable[str], count: int) -> np.ndarray:
        """Which items at the first positions have any of these names. Shape: (count / 8,) uint8, as of `mask_of`."""
        found = np.zeros(-(-count // 8), np.uint8)
        for name in names:
            mask = self._masks.get(name)
            if mask is None:
                positions = self.positions(name)
                mask = mask_of(positions[: np.searchsorted(positions, count)], len(found))
            found[: len(mask)] |= mask[: len(found)]
        return found

    def among(self, positions: np.ndarray, names: Iterable[str]) -> np.ndarray:
        """Which items at these positions have any of these names. Shape: (n,) int64 -> (n,) bool."""
        found = np.zeros(len(positions), bool)
        for name in names:
            mask = self._masks.get(name)
            if mask is None:
                found |= are_in(self.positions(name), positions)
            else:
                bits = mask.take(positions >> 3, mode="clip") >> (positions & 7) & 1
                found |= bits.astype(bool) & (positions < 8 * len(mask))
        return found

    def put(self, row: int, names: Sequence[str]) -> None:
        """Gives a row these names, in place of those it had."""
        while len(self.by_row) <= row:
            self.by_row.append([])
        before, after, position = set(self.by_row[row]), set(names), self._order.position(row)
        self.by_row[row] = list(dict.fromkeys(names))
        with self._lock:
            for name in before ^ after:
                self._changed.setdefault(name, {})[position] = name in after
                self._positions.setdefault(name, NO_POSITIONS)
                if name in self._masks:
                    self._flip(name, position)
            self.names = frozenset(self._positions)

    def _keep_mask(self, name: str) -> None:
        """Makes the mask of a name, if it has none yet and is in many rows."""
        if name not in self._masks and len(self._positions[name]) > MANY_ROWS * len(self.by_row):
            self._masks[name] = self._mask(name)

    def _mask(self, name: str) -> np.ndarray:
        count = max(len(self.by_row), len(self._order.rows))  # a row has any position, also if no later one has names
        return mask_of(self._positions[name], -(-count // 8))

    def _flip(self, name: str, position: int) -> None:
        mask = self._masks[name]
        if position >> 3 >= len(mask):
            mask = self._masks[name] = np.pad(mask, (0, (position >> 3) + 1))
        mask[position >> 3] ^= 1 << (position & 7)


def are_in(ascending: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Which numbers are among others. Shape: (n,) -> (n,) bool."""
    if not len(ascending):
        return np.zeros(len(numbers), bool)
    found: np.ndarray = ascending.take(np.searchsorted(ascending, numbers), mode="clip") == numbers
    return found


def _changed(ascending: np.ndarray, changed: dict[int, bool]) -> np.ndarray:
    """With some numbers taken out or put in. To sort a million anew takes hundreds of times as long."""
    numbers = np.sort(np.array(list(changed), np.int64))
    was_in, is_in = are_in(ascending, numbers), np.array([changed[number] for number in numbers.tolist()])
    if (was_in == is_in).all():  # as it is where an item is described anew
        return ascending
    others = np.delete(ascending, np.searchsorted(ascending, numbers[was_in & ~is_in]))
    added = numbers[is_in & ~was_in]
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
