"""What many requests share, a named subset, categories, the new items or filters, prepared once for all of them.

Per set: a bit per node, the number of open children per node, on which a request's own lists then build, and masks in
the layout of the trie's tables, which replace the trie's own, so that a search with them costs no more than without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from serving.items.ancestry import Ancestry, run_starts
from serving.items.live_trie import Move
from serving.items.trie import LevelMask, Trie, byte_masks
from serving.types import Rules

# Memory for all sets: about 300 of them over 50,000 items, 50 over a million, or 10 over ten million.
SET_BYTES = 256 << 20
# Bytes per node that a set may use for one table: the first levels' fit as floats, the next as bits; in a small
# catalogue the last levels' tables are nearly empty and not worth it.
TABLE_BYTES = 8
MAX_SETS = 1024
ALL_ITEMS = 0  # the slot of the set that blocks nothing


class PreparedSets:
    """Sets in numbered slots of fixed buffers; the least recently used makes room for another.

    members: the catalogue rows that a request's sets leave. bits, open_children: on the host, by
    slot. device_bits: the bits on the search's device.
    """

    def __init__(
        self, trie: Trie, ancestry: Ancestry, members: Callable[[Rules], np.ndarray], set_bytes: int = SET_BYTES
    ) -> None:
        self._members, self._ancestry = members, ancestry
        self._slots: OrderedDict[Rules, int] = OrderedDict()  # least recently used first
        self._prepared = [Rules()]  # what each slot in use is prepared for
        row_width, inner_nodes = trie.nodes + max(trie.max_children), trie.level_start[trie.levels]
        counts = np.min_scalar_type(max(trie.max_children))
        tables = [_empty_table(trie, level) for level in range(trie.levels)]
        bytes_per_set = row_width + counts.itemsize * inner_nodes + sum(table.nbytes for table in tables)
        count = min(MAX_SETS, 1 + set_bytes // bytes_per_set)
        # np.zeros takes no memory until it is written to, and most of these rows never are.
        self.bits = np.zeros((count, row_width), dtype=np.int8)
        self.open_children = np.zeros((count, inner_nodes), dtype=counts)
        self._tables = [np.zeros((count, *table.shape), table.dtype) for table in tables]
        self._fill(ALL_ITEMS, ancestry.leaves(np.arange(len(trie.leaf))))
        device = trie.token.device
        self.device_bits = torch.from_numpy(self.bits).to(device)
        self._device_tables = [torch.from_numpy(table).to(device) for table in self._tables]
        self._byte_masks = byte_masks().to(device)
        self._level_bits, strides, starts = self._layout(trie, row_width)
        self._offsets = (np.arange(count)[:, None] * strides - starts).tolist()

    def __len__(self) -> int:
        return len(self.bits)

    def slot(self, rule: Rules, in_use: set[int]) -> int | None:
        """The slot of the request's sets together, which is prepared if it is not there yet.

        in_use: slots that must not be replaced; gets the one that is returned. None if they are all in use.
        """
        categories = tuple(sorted(set(rule.categories)))
        key = replace(rule, exclude=(), deny=(), allow=None, categories=categories)
        slot = self._slots.get(key)
        if slot is None:
            nodes = self._ancestry.leaves(self._members(rule))
            slot = self._free_slot(in_use)
            if slot is None:
                return None
            self._prepare(slot, nodes)
            self._slots[key] = slot
            self._prepared[slot : slot + 1] = [key]
        self._slots.move_to_end(key)
        in_use.add(slot)
        return slot

    def offsets(self, slot: int) -> list[int]:
        """What leads from a node to its row of a set, in every level's mask and, last, in `device_bits`."""
        offsets: list[int] = self._offsets[slot]
        return offsets

    def level_masks(self, offsets: list[torch.Tensor]) -> tuple[LevelMask | None, ...]:
        """The masks of a batch. offsets: per level (B, 1), as `offsets` gives them."""
        return tuple(
            None if bits is None else LevelMask(bits, offset, self._byte_masks)
            for bits, offset in zip(self._level_bits, offsets, strict=True)
        )

    def _layout(self, trie: Trie, row_width: int) -> tuple[list[torch.Tensor | None], np.ndarray, np.ndarray]:
        """What each level's mask reads; then strides and starts, per level and, last, for `device_bits`.

        Node n is row slot * stride + n - start of what is read.
        """
        level_bits: list[torch.Tensor | None] = [None] * trie.levels
        strides, starts = [row_width] * (trie.levels + 1), [0] * (trie.levels + 1)
        for level, table in enumerate(self._device_tables):
            if table.numel():
                level_bits[level] = table.flatten(0, 1)
                strides[level], starts[level] = table.shape[1], trie.level_start[level]
            elif not trie.tables[level].numel():
                level_bits[level] = self.device_bits.view(-1).unfold(0, trie.max_children[level], 1)
        return level_bits, np.array(strides), np.array(starts)

    def _prepare(self, slot: int, nodes: np.ndarray) -> None:
        """Fills a slot with the set of these leaves."""
        self._fill(slot, nodes)
        if self.device_bits.device.type == "cpu":  # where it is the same memory
            return
        self.device_bits[slot].copy_(torch.from_numpy(self.bits[slot]))
        for on_device, table in zip(self._device_tables, self._tables, strict=True):
            on_device[slot].copy_(torch.from_numpy(table[slot]))

    def _fill(self, slot: int, nodes: np.ndarray) -> None:
        bits, open_children = self.bits[slot], self.open_children[slot]
        bits[:], open_children[:] = -1, 0
        bits[nodes] = 0
        for level in reversed(range(self._ancestry.levels)):
            self._open_in_table(slot, level, nodes)
            nodes, children = self._ancestry.parents(nodes)
            bits[nodes], open_children[nodes] = 0, children

    def _open_in_table(self, slot: int, level: int, nodes: np.ndarray) -> None:
        """Writes a set's mask of one table. nodes: (n,) the set's nodes of the next level, distinct."""
        table = self._tables[level][slot]
        if not table.size:
            return
        row, column = self._ancestry.table_cells(nodes, level)
        if table.dtype == np.float32:
            table[:] = -np.inf
            table[row, column] = 0
            return
        table[:] = 0xFF
        byte = row * np.int64(table.shape[1]) + (column >> 3)
        bit = np.left_shift(1, column & 7).astype(np.uint8)
        if (byte[1:] < byte[:-1]).any():
            order = byte.argsort()
            byte, bit = byte[order], bit[order]
        first = np.flatnonzero(run_starts(byte)[:-1])
        opened = np.bitwise_or.reduceat(bit, first)
        table.reshape(-1)[byte[first]] = ~opened

    # What follows is for a trie that changes (`serving/items/live_trie.py`): unused nodes are blocked in every set.

    def prepared(self) -> list[Rules]:
        """What the slots in use are prepared for, in their order; the first for nothing."""
        return self._prepared[:]

    def open_slots(self, leaf: int) -> list[bool]:
        """Which of the slots in use have an item, by its leaf."""
        return [bit == 0 for bit in self.bits[: len(self._prepared), leaf].tolist()]

    def move(self, move: Move) -> None:
        """Nodes have got other ids."""
        old, new, length = move
        used, inner = len(self._prepared), self.open_children.shape[1]
        for array, unused in ((self.bits, -1), (self.open_children, 0)):
            if array is self.open_children and new >= inner:
                continue
            moved = array[:used, old : old + length].copy()
            array[:used, old : old + length] = unused
            array[:used, new : new + length] = moved

    def mark(self, slot: int, leaf: int, is_open: bool) -> None:
        """Puts an item into a set or takes it out, by its leaf, which is in the trie."""
        bits, open_children, ancestry = self.bits[slot], self.open_children[slot], self._ancestry
        node = leaf
        for level in reversed(range(ancestry.levels)):
            if (bits[node] == 0) == is_open:
                return
            bits[node] = 0 if is_open else -1
            self._mark_in_table(slot, level, node, is_open)
            node = int(ancestry.parent[node])
            open_children[node] = left = int(open_children[node]) + (1 if is_open else -1)
            if left != int(is_open):
                return  # the node above was open before, or still is
        bits[node] = 0 if is_open else -1

    def _mark_in_table(self, slot: int, level: int, node: int, is_open: bool) -> None:
        table = self._tables[level][slot]
        if not table.size:
            return
        row = self._ancestry.parent[node] - self._ancestry.level_start[level]
        column = int(self._ancestry.token[node] - self._ancestry.first_token[level])
        if table.dtype == np.float32:
            table[row, column] = 0 if is_open else -np.inf
        elif is_open:
            table[row, column >> 3] &= 0xFF ^ (1 << (column & 7))
        else:
            table[row, column >> 3] |= 1 << (column & 7)

    def flush(self, nodes: np.ndarray) -> None:
        """Sends what has changed at these nodes to the device, where that is not the CPU. Shape: (n,) int64."""
        if self.device_bits.device.type == "cpu":
            return
        used, starts, device = len(self._prepared), self._ancestry.level_start, self.device_bits.device

        def send(on_device: torch.Tensor, on_host: np.ndarray, index: np.ndarray) -> None:
            on_device[:used, torch.from_numpy(index).to(device)] = torch.from_numpy(on_host[:used, index]).to(device)

        send(self.device_bits, self.bits, nodes)
        for level, (on_device, table) in enumerate(zip(self._device_tables, self._tables, strict=True)):
            if table.shape[2]:
                at_level = nodes[(nodes >= starts[level]) & (nodes < starts[level + 1])]
                send(on_device, table, at_level - starts[level])

    def _free_slot(self, in_use: set[int]) -> int | None:
        if len(self._slots) + 1 < len(self):
            return len(self._slots) + 1
        for key, slot in self._slots.items():
            if slot not in in_use:
                del self._slots[key]
                return slot
        return None


def _empty_table(trie: Trie, level: int) -> np.ndarray:
    """A set's mask of a level's table: floats if that is small enough, else bits, else nothing."""
    nodes, tokens = trie.nodes_at(level), trie.tokens[level]
    if trie.tables[level].numel():
        for row in (np.zeros(tokens, np.float32), np.zeros(-(-tokens // 8), np.uint8)):
            if nodes * row.nbytes <= TABLE_BYTES * trie.nodes:
                return np.broadcast_to(row, (nodes, len(row)))
    return np.zeros((nodes, 0), np.uint8)
