"""Indexes of the fields of items, each made when a filter first names the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.items.labels import Labels
from serving.items.value_index import PARTS, ValueIndex, mask_of


class FieldIndex:
    """Knows the first `rows` items, in masks of (rows / 8,) uint8, see `ValueIndex`. Read on any thread.

    changed: rows that have got other values since it was made. Of these, and of those behind its end, it says anything.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.bytes = rows, -(-rows // 8)
        self.changed: dict[int, None] = {}
        self._columns: dict[tuple[str, str], ValueIndex] = {}
        self._labels: dict[tuple[str, str], np.ndarray] = {}  # of names that many rows have

    def column(self, field: str, kind: str, column: np.ndarray) -> ValueIndex:
        """The index of a field's numbers, times or codes of strings."""
        index = self._columns.get((field, kind))
        if index is None:
            column = column[: self.rows].copy()  # as it is now, whoever changes it
            has_value = column >= 0 if column.dtype == np.int32 else ~np.isnan(column)
            index = self._columns[field, kind] = ValueIndex(column, has_value)
        return index

    def having(self, field: str, names: Sequence[str], labels: Labels) -> np.ndarray:
        """The rows with any of these names in their lists."""
        mask = np.zeros(self.bytes, np.uint8)
        for name in names:
            mask |= self._having(field, name, labels)
        return mask

    def _having(self, field: str, name: str, labels: Labels) -> np.ndarray:
        mask = self._labels.get((field, name))
        if mask is None:
            rows = labels.rows(name)
            mask = mask_of(rows[: np.searchsorted(rows, self.rows)], self.bytes)
            if len(rows) > self.rows // PARTS:
                self._labels[field, name] = mask
        return mask

    def outdated(self, count: int) -> np.ndarray:
        """Which of the first `count` rows it does not know as they are. Shape: (n,) int64."""
        changed = np.sort(np.array(list(self.changed), np.int64))
        return np.concatenate([changed[changed < min(count, self.rows)], np.arange(self.rows, count)])
