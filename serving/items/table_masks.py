"""What prepared sets leave of a level's table, in its own layout, so that a search reads it at no extra cost."""

from __future__ import annotations

import numpy as np
import torch

from serving.items.ancestry import Ancestry
from serving.items.trie import NEG_INF_BITS, Trie

# Bytes per node that a set may use for one table: the first levels' fit as floats, the next as bits; in a small
# catalogue the last levels' tables are nearly empty and not worth it.
TABLE_BYTES = 8


class TableMasks:
    """The masks of one level, n nodes with `tokens` columns each, for a number of sets.

    by_slot: (slots, n, tokens) float32, -inf where a child is hidden or missing and 0 elsewhere; or (slots, n,
    tokens / 8) uint8, eight columns a byte, the lowest bit first, 1 there; or (slots, n, 0), if the level has none.
    empty: the shape and type of one, see `empty_mask`.
    """

    def __init__(self, ancestry: Ancestry, level: int, empty: np.ndarray, slots: int) -> None:
        self._ancestry, self._level, self._first = ancestry, level, ancestry.level_start[level + 1]
        self.by_slot = np.zeros((slots, *empty.shape), empty.dtype)
        self._bytes_per_row = empty.shape[1] if empty.dtype == np.uint8 else -(-empty.shape[1] // 8)
        # Of the nodes of the next level: the byte of a mask of bits that has each, and what clears its bit when it is
        # added; without a mask, their parents. Computed anew, they take longer than all the rest.
        children = np.arange(self._first, ancestry.level_start[level + 2])
        self._index = np.zeros(len(children), np.int64)
        self._bit = np.zeros(len(children) if empty.size else 0, np.uint8)
        self.locate(children)

    def locate(self, nodes: np.ndarray) -> None:
        """Learns which cells or parents nodes of the next level have by now. Shape: (n,) int64."""
        index, column = self._ancestry.table_cells(nodes, self._level)
        if self.by_slot.size:
            index = index * self._bytes_per_row + (column >> 3)
            self._bit[nodes - self._first] = 256 - (1 << (column & 7))
        self._index[nodes - self._first] = np.maximum(index, 0)  # an unused node has none, and is never open

    def fill(self, slot: int, nodes: np.ndarray | slice, is_open: np.ndarray | np.bool) -> None:
        """Writes a set's mask: of these distinct nodes of the next level, counted within it, those are open."""
        mask = self.by_slot[slot]
        if not mask.size:
            return
        bits = mask if mask.dtype == np.uint8 else np.empty((len(mask), self._bytes_per_row), np.uint8)
        bits[:] = 0xFF
        add_at(bits.reshape(-1), self._index[nodes], self._bit[nodes] * is_open.view(np.uint8))
        if mask.dtype != np.uint8:
            hidden = np.unpackbits(bits, 1, mask.shape[1], "little")
            np.multiply(hidden, np.int32(NEG_INF_BITS), out=mask.view(np.int32))  # np.where takes ten times as long

    def open_children(self, slot: int, is_open: np.ndarray) -> np.ndarray:
        """How many children a set leaves each node of the level. is_open: those, as its mask has them, if it has one.

        Shape: (nodes of the next level,) bool -> (n,) int.
        """
        mask = self.by_slot[slot]
        left: np.ndarray
        if not mask.size:  # bits of a mask are counted in a third of the time
            left = np.zeros(len(mask), np.uint8 if self._ancestry.max_children[self._level] < 256 else np.int32)
            add_at(left, self._index, is_open.view(np.uint8).astype(left.dtype, copy=False))
            return left
        if mask.dtype != np.uint8:
            left = np.count_nonzero(mask == 0, axis=1)
            return left
        words = mask.view(np.uint64) if mask.shape[1] % 8 == 0 else mask
        left = np.full(len(mask), 8 * mask.shape[1], np.int32)
        for hidden in np.bitwise_count(words).T:  # a sum over so short an axis takes three times as long
            left -= hidden  # with what fills the last byte
        return left

    def mark(self, slot: int, node: int, is_open: bool) -> None:
        """Opens or hides a node of the next level."""
        mask = self.by_slot[slot]
        if not mask.size:
            return
        row, column = (int(cell[0]) for cell in self._ancestry.table_cells(np.array([node]), self._level))
        if mask.dtype != np.uint8:
            mask[row, column] = 0 if is_open else -np.inf
        elif is_open:
            mask[row, column >> 3] &= 0xFF ^ (1 << (column & 7))
        else:
            mask[row, column >> 3] |= 1 << (column & 7)


def empty_mask(trie: Trie, level: int) -> np.ndarray:
    """A set's mask of a level's table: floats if that is small enough, else bits, else nothing."""
    nodes, tokens = trie.nodes_at(level), trie.tokens[level]
    if trie.tables[level].numel():
        for row in (np.zeros(tokens, np.float32), np.zeros(-(-tokens // 8), np.uint8)):
            if nodes * row.nbytes <= TABLE_BYTES * trie.nodes:
                return np.broadcast_to(row, (nodes, len(row)))
    return np.zeros((nodes, 0), np.uint8)


def add_at(array: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
    """Adds values of the array's type at indices, int64, that may repeat: `np.add.at`, in half the time."""
    torch.from_numpy(array).scatter_add_(0, torch.from_numpy(index), torch.from_numpy(values))
