"""Names by row, such as items' categories, and rows by name. Read on any thread, changed on one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

NO_ROWS = np.empty(0, np.int64)


class Labels:
    """by_row: the names of each row; rows behind its end have none. names: all that any row has had."""

    def __init__(self, by_row: list[list[str]]) -> None:
        self.by_row = by_row
        members: dict[str, list[int]] = {}
        for row, names in enumerate(by_row):
            for name in names:
                members.setdefault(name, []).append(row)
        self._rows = {name: np.unique(rows) for name, rows in members.items()}
        self._changed: dict[str, dict[int, bool]] = {}  # not yet in _rows
        self._lock = threading.Lock()  # guards these two
        self.names = frozenset(members)

    def of(self, row: int) -> Sequence[str]:
        return self.by_row[row] if row < len(self.by_row) else ()

    def rows(self, name: str) -> np.ndarray:
        """The rows that have a name. Shape: (n,) int64, ascending."""
        with self._lock:
            changed = self._changed.pop(name, None)
            if changed:
                rows, has_name = np.array(list(changed), np.int64), np.array(list(changed.values()))
                others = np.setdiff1d(self._rows[name], rows, assume_unique=True)
                self._rows[name] = np.union1d(others, rows[has_name])
            return self._rows.get(name, NO_ROWS)

    def put(self, row: int, names: Sequence[str]) -> None:
        """Gives a row these names, in place of those it had."""
        self.by_row += [[] for _ in range(1 + row - len(self.by_row))]
        before, after = set(self.by_row[row]), set(names)
        self.by_row[row] = list(dict.fromkeys(names))
        with self._lock:
            for name in before ^ after:
                self._changed.setdefault(name, {})[row] = name in after
                self._rows.setdefault(name, NO_ROWS)
            self.names = frozenset(self._rows)
