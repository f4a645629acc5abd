"""Business rules inside the search: which nodes of the trie have no permitted item at or below them.

Such nodes are blocked before the beam is cut; that is why k items come back whenever k are permitted. The work grows
with a request's own lists, not with the catalogue: from the leaves of a list upwards, a node is blocked as soon as all
its open children are. What requests share is prepared once (`serving/items/prepared_sets.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from serving.items.ancestry import Ancestry
from serving.items.blocked import Blocked
from serving.items.boosts import Boosts
from serving.items.order import ItemSets
from serving.items.prepared_sets import ALL_ITEMS, SET_BYTES, PreparedSets
from serving.items.trie import Trie
from serving.types import Boost, Rules

NO_RULES = Rules()
NO_NODES = np.empty(0, np.int32)


def no_sets(rules: Rules) -> np.ndarray:
    raise ValueError(f"There are no named subsets, categories or filters here, so {rules} has no meaning.")


NO_SETS = ItemSets(no_sets)


class SetsInUse(Exception):
    """The requests of a batch have more different boosts than sets can be prepared at a time."""


class RuleBook:
    """Turns the rules of a batch into a `Blocked`. One batch at a time: its buffers are reused.

    item_sets: what rules may name (`Catalogue.sets`).
    rows: the widest batch to come. A wider one moves to new buffers, which a captured graph would not follow.
    host: the same trie on the CPU, if it changes there first (`serving/items/live_trie.py`).
    """

    def __init__(
        self,
        trie: Trie,
        item_sets: ItemSets = NO_SETS,
        *,
        rows: int = 1,
        set_bytes: int = SET_BYTES,
        host: Trie | None = None,
    ) -> None:
        self._trie, self._levels, self._device = trie, trie.levels, trie.token.device
        self._row_width = trie.nodes + max(trie.max_children)
        self._ancestry, self._is_live = Ancestry(host or trie, item_sets.order), host is not None
        self.sets = PreparedSets(trie, self._ancestry, item_sets.members, set_bytes)
        self._busy = False
        self._boosting: set[int] = set()  # slots that the boosts of the batch read
        self._allocate(rows)

    def prepare(self, rules: Sequence[Rules]) -> None:
        """Prepares the sets that these rules name, as many as fit, so that no request waits for it."""
        for rule in rules[: len(self.sets) - 1]:
            self.sets.slot(rule, set())

    def boosts(self, boosts: Sequence[Sequence[Boost]]) -> Boosts | None:
        """The boosts of a batch, to be asked for before what its rules block; None if no request has any.

        Raises SetsInUse."""
        self._boosting = set()
        most = max(map(len, boosts), default=0)
        if not most:
            return None
        slots = np.full((most, len(boosts), 1), ALL_ITEMS)
        added = np.zeros((2, most, len(boosts), 1), np.float32)  # where a set is open, and where not
        for request, own in enumerate(boosts):
            for number, boost in enumerate(own):
                slot = self.sets.slot(boost.rules, self._boosting)
                if slot is None:
                    raise SetsInUse
                slots[number, request] = slot
                added[int(boost.log_factor < 0), number, request] = boost.log_factor
        offset = torch.from_numpy(slots * self._row_width).to(self._device)
        where_open, where_shut = torch.from_numpy(added).to(self._device)
        return Boosts(self._trie, self.sets.device_bits, offset.unbind(), where_open.unbind(), where_shut.unbind())

    @contextmanager
    def blocked(self, rules: Sequence[Rules]) -> Iterator[Blocked | None]:
        """What the rules block, for as long as the context is open; None if there are no rules at all.

        Raises what `members` raises. Nothing is left in the buffers then, nor if the search raises.
        """
        if all(rule == NO_RULES for rule in rules):
            yield None
            return
        if self._busy:
            raise RuntimeError("The rules of another batch are still in use; leave their context first.")
        if len(rules) > len(self._own):
            self._allocate(1 << (len(rules) - 1).bit_length())
        in_use = self._boosting.copy()
        marks = [self._mark(rule, in_use) for rule in rules]
        lists, sets = any(len(nodes) or inverted for nodes, inverted, _ in marks), any(slot for _, _, slot in marks)
        index = None
        if lists:  # made before anything is written: to clear the rows again takes no more memory
            entries = [nodes + np.int64(row) * self._row_width for row, (nodes, _, _) in enumerate(marks)]
            index = torch.from_numpy(np.concatenate(entries)).to(self._device)
        self._busy = True
        try:
            self._fill(self._set_offset, self._host_set_offset, [self.sets.offsets(slot) for _, _, slot in marks])
            if index is not None:
                self._fill(self._inverted, self._host_inverted, [[-inverted] for _, inverted, _ in marks])
                self._write(index, -1)
            yield replace(self._view(len(rules), lists, sets), most=self._most_blocked(rules, marks))
        finally:
            if index is not None:
                self._write(index, 0)
            self._busy = False

    def _mark(self, rule: Rules, in_use: set[int]) -> tuple[np.ndarray, bool, int]:
        """The nodes to mark in a request's own row, whether they are those it permits, and the slot of its set."""
        ancestry, sets = self._ancestry, self.sets
        denied = ancestry.leaves(_array(rule.exclude + rule.deny)) if rule.exclude or rule.deny else NO_NODES
        allowed = None if rule.allow is None else ancestry.leaves(_array(rule.allow))
        slot = ALL_ITEMS
        if rule.catalogue is not None or rule.categories or rule.new_only or rule.filters:
            prepared = sets.slot(rule, in_use)
            if prepared is None:  # other requests of this batch use all slots: the set is a list like any other
                members = np.flatnonzero(sets.open_leaves(rule)) + ancestry.first_leaf
                allowed = members if allowed is None else np.intersect1d(allowed, members, assume_unique=True)
            else:
                slot = prepared
        if allowed is None and not len(denied):  # a set alone: all of it is prepared
            return NO_NODES, False, slot
        if slot != ALL_ITEMS:
            outside = sets.bits[slot]
            denied = denied[outside[denied] == 0]
            allowed = None if allowed is None else allowed[outside[allowed] == 0]
        if allowed is not None:
            permitted = np.setdiff1d(allowed, denied, assume_unique=True)
            return np.concatenate(list(ancestry.with_ancestors(permitted))), True, ALL_ITEMS
        return np.concatenate(list(ancestry.with_emptied(denied, sets.open_children[slot]))), False, slot

    def _most_blocked(self, rules: Sequence[Rules], marks: Sequence[tuple[np.ndarray, bool, int]]) -> int | None:
        """Not known where items come and go, nor of sets and of what is not allowed."""
        if self._is_live or any(slot != ALL_ITEMS or inverted for _, inverted, slot in marks):
            return None
        return max(len(rule.exclude) + len(rule.deny) for rule in rules)

    def _view(self, batch: int, lists: bool, sets: bool) -> Blocked:
        """The buffers as a batch reads them; kept, for making so many views takes 20 us."""
        view = self._views.get((batch, lists, sets))
        if view is None:
            *level_offsets, set_offset = torch.split(self._set_offset[:batch], 1, 1)
            view = self._views[batch, lists, sets] = Blocked(
                self._own[:batch] if lists else self._own[:batch, :0],
                self._own_offset[:batch],
                self._inverted[:batch],
                self.sets.device_bits if sets else self.sets.device_bits[:1],
                set_offset,
                self.sets.level_masks(level_offsets),
            )
        return view

    def _fill(self, buffer: torch.Tensor, host: np.ndarray, rows: Sequence[Sequence[int]]) -> None:
        """Sets the first rows of a buffer; on the CPU `host` is its memory."""
        host[: len(rows)] = rows
        if self._device.type != "cpu":
            buffer.copy_(torch.from_numpy(host))

    def _write(self, index: torch.Tensor, bit: int) -> None:
        """Sets entries of the requests' own rows, which are numbered through all rows. Shape: (n,) int64."""
        if self._device.type == "cpu":
            self._own.numpy().reshape(-1)[index.numpy()] = bit  # torch's index_fill takes ten times as long
        else:
            self._own.view(-1).index_fill_(0, index, bit)

    def _allocate(self, rows: int) -> None:
        self._views: dict[tuple[int, bool, bool], Blocked] = {}  # by batch, and whether lists and sets are read
        with torch.inference_mode(False):  # later calls write to them, in inference mode or not
            self._own_offset = torch.arange(rows, device=self._device).unsqueeze(1) * self._row_width
            self._host_inverted = np.zeros((rows, 1), np.int8)
            self._host_set_offset = np.zeros((rows, self._levels + 1), np.int64)
            self._inverted = torch.from_numpy(self._host_inverted).to(self._device)
            self._set_offset = torch.from_numpy(self._host_set_offset).to(self._device)
            # Last: by its length the other buffers are known to be long enough.
            if self._device.type == "cpu":
                self._own = torch.from_numpy(np.zeros((rows, self._row_width), dtype=np.int8))
            else:
                self._own = torch.zeros(rows, self._row_width, dtype=torch.int8, device=self._device)


def _array(rows: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(struct.pack(f"{len(rows)}q", *rows), np.int64)  # 40% faster than np.fromiter
