"""Trie and rules of a catalogue that changes, held in line with it row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from serving.items.catalogue import Catalogue
from serving.items.live_trie import LiveTrie, TrieFull
from serving.items.prepared_sets import SET_BYTES
from serving.items.rules import RuleBook
from serving.items.trie import TABLE_ENTRIES
from serving.types import Rules


class LiveIndex:
    """Begins with the items that are listed now; may be made while another is in use. Not thread-safe.

    room: how many items may be added. prepared: sets to prepare at once. rule_rows: see `RuleBook`.
    item_tokens: (capacity, M) int64 by catalogue row, on the device.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        level_ranges: Sequence[tuple[int, int]],
        *,
        room: int,
        device: torch.device | str = "cpu",
        rule_rows: int = 1,
        prepared: Sequence[Rules] = (),
        set_bytes: int = SET_BYTES,
        table_entries: int = TABLE_ENTRIES,
    ) -> None:
        listed = catalogue.listed_rows()
        tokens = catalogue.tokens  # after these: an item that is listed by now has its own
        self.catalogue, self.capacity, self._rows_to_come = catalogue, len(tokens) + room, room
        self.items = LiveTrie(
            tokens[listed], listed, level_ranges, capacity=self.capacity, room=room, device=device,
            table_entries=table_entries,
        )  # fmt: skip
        self.trie = self.items.trie
        self.rules = RuleBook(self.trie, catalogue.sets, rows=rule_rows, set_bytes=set_bytes, host=self.items.host)
        self.items.on_move = self.rules.sets.move
        self.rules.prepare(prepared)
        item_tokens = np.empty((self.capacity, tokens.shape[1]), np.int64)
        item_tokens[: len(tokens)] = tokens
        item_tokens[len(tokens) :] = tokens[0]  # what pads rows of items is read too, and has to be an item
        self.item_tokens = torch.from_numpy(item_tokens).to(device)

    @property
    def room(self) -> float:
        """How much of the room is left, 0..1."""
        return min(self.items.room, (self.capacity - len(self.catalogue)) / self._rows_to_come)

    def refresh(self, rows: Sequence[int]) -> list[int]:
        """Brings what is said of these rows in line with the catalogue. Returns those for which there is no room."""
        known = [row for row in rows if row < self.capacity]
        self.item_tokens[known] = torch.from_numpy(self.catalogue.tokens[known]).to(self.item_tokens)
        left_out = [row for row in rows if not self._refresh(row)]
        self.rules.sets.flush(self.items.flush())
        return left_out

    def _refresh(self, row: int) -> bool:
        catalogue, sets = self.catalogue, self.rules.sets
        is_listed = bool(catalogue.listed[row])
        if is_listed and row not in self.items:
            try:
                self.items.add(row, catalogue.tokens[row].tolist())
            except TrieFull:
                return False
        if row in self.items:
            leaf = self.items.node_of(row)
            for slot, (rules, is_open) in enumerate(zip(sets.prepared(), sets.open_slots(leaf), strict=True)):
                if is_open != (is_listed and catalogue.is_member(row, rules)):
                    sets.mark(slot, leaf, not is_open)
            if not is_listed:
                self.items.remove(row)
        return True
