"""What many requests share, a named subset, categories, the new items or filters, prepared once for all of them.

Per set: a bit per node, the number of open children per node, on which a request's own lists then build, and masks in
the layout of the trie's tables, which replace the trie's own, so that a search with them costs no more than without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from serving.items.ancestry import Ancestry
from serving.items.live_trie import Move
from serving.items.table_masks import TableMasks, empty_mask
from serving.items.trie import LevelMask, Trie, byte_masks
from serving.types import Rules

# Memory for all sets: about 300 of them over 50,000 items, 50 over a million, or 10 over ten million.
SET_BYTES = 256 << 20
MAX_SETS = 1024
FEW = 0.03  # of all items: a walk up from so many leaves takes as long as passes over all nodes
ALL_ITEMS = 0  # the slot of the set that blocks nothing


class PreparedSets:
    """Sets in numbered slots of fixed buffers; the least recently used makes room for another.

    members: which items a request's sets leave, in the order that `ancestry` knows. bits, open_children: on the host,
    by slot. device_bits: the bits on the search's device.
    """

    def __init__(
        self, trie: Trie, ancestry: Ancestry, members: Callable[[Rules], np.ndarray], set_bytes: int = SET_BYTES
    ) -> None:
        self._members, self._ancestry = members, ancestry
        self._slots: OrderedDict[Rules, int] = OrderedDict()  # least recently used first
        self._prepared = [Rules()]  # what each slot in use is prepared for
        row_width, inner_nodes = trie.nodes + max(trie.max_children), trie.level_start[trie.levels]
        counts = np.min_scalar_type(-1 - max(trie.max_children))  # signed, as torch adds to them
        empty = [empty_mask(trie, level) for level in range(trie.levels)]
        bytes_per_set = row_width + counts.itemsize * inner_nodes + sum(mask.nbytes for mask in empty)
        count = min(MAX_SETS, 1 + set_bytes // bytes_per_set)
        # np.zeros takes no memory until it is written to, and most of these rows never are.
        self.bits = np.zeros((count, row_width), dtype=np.int8)
        self.open_children = np.zeros((count, inner_nodes), dtype=counts)
        self._masks = [TableMasks(ancestry, level, mask, count) for level, mask in enumerate(empty)]
        is_leaf = np.zeros(ancestry.leaves_at_most, bool)
        is_leaf[ancestry.leaves(np.arange(len(trie.leaf))) - ancestry.first_leaf] = True
        self._fill_in_passes(ALL_ITEMS, is_leaf)
        device = trie.token.device
        self.device_bits = torch.from_numpy(self.bits).to(device)
        self._device_masks = [torch.from_numpy(masks.by_slot).to(device) for masks in self._masks]
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
            is_open = self.open_leaves(rule)
            slot = self._free_slot(in_use)
            if slot is None:
                return None
            self._prepare(slot, is_open)
            self._slots[key] = slot
            self._prepared[slot : slot + 1] = [key]
        self._slots.move_to_end(key)
        in_use.add(slot)
        return slot

    def open_leaves(self, rule: Rules) -> np.ndarray:
        """Which leaves have items that the request's sets leave. Shape: (leaves,) bool."""
        is_member = self._ancestry.by_leaf(self._members(rule))
        unused = self.bits[ALL_ITEMS, self._ancestry.first_leaf :][: self._ancestry.leaves_at_most]
        is_open: np.ndarray = is_member.view(np.uint8) > unused.view(np.uint8)  # is_member & (unused == 0), in one pass
        return is_open

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
        for level, masks in enumerate(self._device_masks):
            if masks.numel():
                level_bits[level] = masks.flatten(0, 1)
                strides[level], starts[level] = masks.shape[1], trie.level_start[level]
            elif not trie.tables[level].numel():
                level_bits[level] = self.device_bits.view(-1).unfold(0, trie.max_children[level], 1)
        return level_bits, np.array(strides), np.array(starts)

    def _prepare(self, slot: int, is_open: np.ndarray) -> None:
        """Fills a slot with the set of these leaves. Shape: (leaves,) bool."""
        if np.count_nonzero(is_open) <= FEW * len(is_open):
            self._fill_upwards(slot, np.flatnonzero(is_open) + self._ancestry.first_leaf)
        else:
            self._fill_in_passes(slot, is_open)
        if self.device_bits.device.type == "cpu":  # where it is the same memory
            return
        self.device_bits[slot].copy_(torch.from_numpy(self.bits[slot]))
        for on_device, masks in zip(self._device_masks, self._masks, strict=True):
            on_device[slot].copy_(torch.from_numpy(masks.by_slot[slot]))

    def _fill_upwards(self, slot: int, nodes: np.ndarray) -> None:
        """From the leaves of a set to the nodes above them: takes time in proportion to their number."""
        bits, open_children = self.bits[slot], self.open_children[slot]
        bits[:], open_children[:] = -1, 0
        bits[nodes] = 0
        for level in reversed(range(self._ancestry.levels)):
            self._masks[level].fill(slot, nodes - self._ancestry.level_start[level + 1], np.True_)
            nodes, children = self._ancestry.parents(nodes)
            bits[nodes], open_children[nodes] = 0, children

    def _fill_in_passes(self, slot: int, is_open: np.ndarray) -> None:
        """From all leaves, level by level: takes the same time for every set. is_open: (leaves,) bool, those in it."""
        bits, open_children, starts = self.bits[slot], self.open_children[slot], self._ancestry.level_start
        bits[starts[-1] :] = -1
        for level in reversed(range(self._ancestry.levels)):
            nodes = slice(starts[level + 1], starts[level + 2])
            np.subtract(is_open.view(np.int8), 1, out=bits[nodes])
            self._masks[level].fill(slot, slice(None), is_open)
            left = self._masks[level].open_children(slot, is_open)
            open_children[starts[level] : starts[level + 1]] = left
            is_open = left > 0
        bits[:1] = is_open.view(np.int8) - 1

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
            self._masks[level].mark(slot, node, is_open)
            node = int(ancestry.parent[node])
            open_children[node] = left = int(open_children[node]) + (1 if is_open else -1)
            if left != int(is_open):
                return  # the node above was open before, or still is
        bits[node] = 0 if is_open else -1

    def flush(self, nodes: np.ndarray) -> None:
        """Learns which nodes are above these by now, and sends what has changed at them to the device, where that is
        not the CPU. Shape: (n,) int64."""
        used, starts, device = len(self._prepared), self._ancestry.level_start, self.device_bits.device
        at_level = [nodes[(nodes >= start) & (nodes < end)] for start, end in pairwise(starts)]
        self._ancestry.move(at_level[-1] - starts[-2])
        for masks, children in zip(self._masks, at_level[1:], strict=True):
            masks.locate(children)
        if device.type == "cpu":
            return

        def send(on_device: torch.Tensor, on_host: np.ndarray, index: np.ndarray) -> None:
            on_device[:used, torch.from_numpy(index).to(device)] = torch.from_numpy(on_host[:used, index]).to(device)

        send(self.device_bits, self.bits, nodes)
        for level, (on_device, masks) in enumerate(zip(self._device_masks, self._masks, strict=True)):
            if on_device.numel():
                send(on_device, masks.by_slot, at_level[level] - starts[level])

    def _free_slot(self, in_use: set[int]) -> int | None:
        if len(self._slots) + 1 < len(self):
            return len(self._slots) + 1
        for key, slot in self._slots.items():
            if slot not in in_use:
                del self._slots[key]
                return slot
        return None
