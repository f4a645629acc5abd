"""Which items have changed since their bundle was made, in the order of their last changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import numpy as np

ChangeKind = Literal["added", "changed", "removed"]
KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)


class ItemChange(NamedTuple):
    """An item's last change. number: the greater, the later. at: seconds since 1970, None where the log has no time."""

    row: int
    kind: ChangeKind
    number: int
    at: float | None


class ChangedItems:
    """The last change of every item that has one, by catalogue row. One thread notes changes, any may read them.

    bundled: how many items the bundle has. Those behind them were added, however often they have changed since.
    """

    def __init__(self, bundled: int) -> None:
        self._bundled, self._count = bundled, 0
        self._at = np.zeros(bundled)
        # Numbers of changes, 0 where there is none. A removal's is negative: no reader can see half of a change.
        self._numbers = np.zeros(bundled, np.int64)

    def note(self, row: int, at: float | None, *, is_removed: bool) -> None:
        if row >= len(self._at):
            self._at = np.append(self._at, np.zeros(row + 1))
            self._numbers = np.append(self._numbers, np.zeros(row + 1, np.int64))
        self._count += 1
        self._at[row] = np.nan if at is None else at
        self._numbers[row] = -self._count if is_removed else self._count

    def is_removed(self, row: int) -> bool:
        return row < len(self._numbers) and bool(self._numbers[row] < 0)

    def newest(self, limit: int, kinds: Collection[ChangeKind] = KINDS, before: int | None = None) -> list[ItemChange]:
        """At most `limit` items, last changed first, of these kinds and with numbers below `before`.

        Passes over all rows: for a thread, where there are 1,000,000.
        """
        numbers, bundled = self._numbers.copy(), self._bundled  # more changes may come meanwhile
        is_wanted = np.zeros(len(numbers), bool)
        if "added" in kinds:
            is_wanted[bundled:] = numbers[bundled:] > 0
        if "changed" in kinds:
            is_wanted[:bundled] = numbers[:bundled] > 0
        if "removed" in kinds:
            is_wanted |= numbers < 0
        order = np.abs(numbers)
        if before is not None:
            is_wanted &= order < before
        rows = np.flatnonzero(is_wanted)
        if len(rows) > limit:
            rows = rows[np.argpartition(order[rows], -limit)[-limit:]]
        found = rows[np.argsort(-order[rows])].tolist()
        return [self._change(row, int(numbers[row])) for row in found]

    def _change(self, row: int, number: int) -> ItemChange:
        kind: ChangeKind = "removed" if number < 0 else "changed" if row < self._bundled else "added"
        at = float(self._at[row])
        return ItemChange(row, kind, abs(number), None if np.isnan(at) else at)
