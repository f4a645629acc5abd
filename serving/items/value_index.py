"""Which rows of a column have a value within bounds, without a pass over it: a binned bitmap index.

Masks are uint8, eight rows a byte, the lowest bit first. The rows lie in the order of their values, and for every 128th
of them a mask says which come before; between two of these, only the rows in between are looked at.
"""

from __future__ import annotations

import numpy as np

PARTS = 128
ROW_BYTES = 28  # that an index takes for each row with a value; 24 where values are int32


class ValueIndex:
    """Takes `ROW_BYTES` for each row that has a value."""

    def __init__(self, column: np.ndarray) -> None:
        rows = np.flatnonzero(has_value(column))
        self._rows = rows[np.argsort(column[rows])].astype(np.int32)
        self._values, self._bytes = column[self._rows], -(-len(column) // 8)
        self._per_part = max(1, -(-len(rows) // PARTS))
        parts = [self._rows[begin : begin + self._per_part] for begin in range(0, len(rows), self._per_part)]
        masks = [np.zeros(self._bytes, np.uint8), *(mask_of(part, self._bytes) for part in parts)]
        self._before = np.bitwise_or.accumulate(masks)  # of every part, and of the end

    def every(self) -> np.ndarray:
        """All rows with a value. Not to be written to."""
        mask: np.ndarray = self._before[-1]
        return mask

    def compared(self, order: str, value: float) -> np.ndarray:
        """Those whose value is in this order with another."""
        below = self._first(int(np.searchsorted(self._values, value, "left" if order in ("<", ">=") else "right")))
        if order in ("<", "<="):
            return below
        above: np.ndarray = below ^ self.every()
        return above

    def among(self, values: np.ndarray) -> np.ndarray:
        """Those with one of these values. Shape: (n,) of the column's type."""
        values = np.unique(values)  # -0 and 0 are one
        begins, ends = (np.searchsorted(self._values, values, side).tolist() for side in ("left", "right"))
        mask, rows = np.zeros(self._bytes, np.uint8), [self._rows[:0]]
        for begin, end in zip(begins, ends, strict=True):
            if end - begin <= self._per_part:  # no more than may lie between masks
                rows.append(self._rows[begin:end])
            else:
                mask ^= self._first(begin) ^ self._first(end)
        mask ^= mask_of(np.concatenate(rows), self._bytes)
        return mask

    def _first(self, count: int) -> np.ndarray:
        """The rows of so many values, the lowest."""
        part = min((count + self._per_part // 2) // self._per_part, len(self._before) - 1)  # that ends nearest to there
        wrong = slice(*sorted((count, part * self._per_part)))
        mask = mask_of(self._rows[wrong], self._bytes)
        mask ^= self._before[part]
        return mask


def has_value(column: np.ndarray) -> np.ndarray:
    """Which rows of numbers, times or codes of strings have one. Shape: (n,) -> (n,) bool."""
    return column >= 0 if column.dtype == np.int32 else ~np.isnan(column)


def mask_of(rows: np.ndarray, length: int) -> np.ndarray:
    """The mask with these distinct rows. Shape: (n,) -> (length,) uint8."""
    mask = np.zeros(length, np.uint8)
    np.add.at(mask, (rows >> 3).astype(np.intp), np.left_shift(1, rows & 7).astype(np.uint8))
    return mask
