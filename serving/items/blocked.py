"""Which nodes of the trie a batch of searches may not reach, as tensors on the search's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from serving.items.trie import LevelMask, Trie, minus_inf


@dataclass(frozen=True, slots=True)
class Blocked:
    """What a batch of searches may not reach. The tensors are views of buffers that a `RuleBook` updates in place.

    Bits are int8, 0 or -1. A row has one per node and C more, so that a run of C, the most children of any node, can be
    read from any node. Offsets (B, 1) int64 say where a request's row begins in the flattened buffer.

    own: (B, N + C) bits, the nodes that a request's own lists block; or, where the bit in `inverted` (B, 1) is -1, all
        nodes that it permits. (B, 0) if no request has lists.
    sets: (slots, N + C) bits, the nodes that a prepared set blocks; slot 0 blocks none, and is the only one if no
        request has a set.
    level_masks: for every level, what the sets leave of it; None if that has to be read node by node.
    most: how many of the catalogue's items are blocked for any request, at most; None if that is not known.
    """

    own: torch.Tensor
    own_offset: torch.Tensor
    inverted: torch.Tensor
    sets: torch.Tensor
    set_offset: torch.Tensor
    level_masks: tuple[LevelMask | None, ...]
    most: int | None = None

    @property
    def reads(self) -> tuple[bool, bool]:
        """Whether any request has lists of its own, and whether any has a prepared set."""
        return self.own.shape[1] > 0, self.sets.shape[0] > 1

    def expand(
        self, trie: Trie, log_probs: torch.Tensor, node: torch.Tensor, level: int, *, first_id: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Trie.expand`, with -inf also where no permitted item is at or below a child."""
        lists, sets = self.reads
        mask = self.level_masks[level] if sets else None
        scores, child = trie.expand(log_probs, node, level, mask, first_id=first_id)
        if lists:
            bits = read_bits(self.own, self.own_offset, child, trie.tables[level])
            scores = scores + minus_inf(bits ^ self.inverted.unsqueeze(-1))
        if sets and mask is None:
            scores = scores + minus_inf(read_bits(self.sets, self.set_offset, child, trie.tables[level]))
        return scores, child

    def items(self, trie: Trie, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Which items are not permitted or not in the trie, of all (None) or of some for each request.

        Shape: rows (B, C) catalogue rows -> (B, C) bool; None -> (B, I) bool.
        """
        leaf = trie.leaf if rows is None else trie.leaf.take(rows)
        node, (lists, sets) = leaf.to(torch.int64) + trie.level_start[trie.levels], self.reads
        barred = (leaf < 0).expand(len(self.set_offset), -1)
        if lists:
            barred = barred | (self.own.take(node + self.own_offset) ^ self.inverted).bool()
        if sets:
            barred = barred | self.sets.take(node + self.set_offset).bool()
        return barred


def read_bits(rows: torch.Tensor, offset: torch.Tensor, child: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The bits of children, which are runs if there is no table. Shape: (n, N + C), (B, 1), (B, Q, C) -> (B, Q, C)."""
    if not table.numel():
        return F.embedding(child[..., 0] + offset, rows.view(-1).unfold(0, child.shape[-1], 1))
    index = child + offset.unsqueeze(-1)
    return rows.view(-1).index_select(0, index.view(-1)).view(child.shape)
