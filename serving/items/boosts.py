"""What boosts add to the log scores of items, and the most that they add to any item below a node of the trie.

A boost is read from the bits of a prepared set. One that raises items, by log f > 0, has the set of these items: it
adds log f at a node with any of them at or below. One that lowers items has the set of all others, and adds log f < 0
where none of those is. At a leaf that is what the item gets; above, it is the most that any item there gets, and the
sum over boosts is no less than what all of them together add to any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.blocked import read_bits
from serving.items.trie import Trie


@dataclass(frozen=True, slots=True)
class Boosts:
    """Of B requests with up to n boosts each; the others of a request add nothing.

    sets: (slots, N + C) int8, a bit per node, -1 where a set has no item at or below. offset: per boost (B, 1) int64,
    what leads from a node to its bit in the flattened sets. where_open, where_shut: per boost (B, 1) float32, what is
    added for a bit of 0 and of -1.
    """

    trie: Trie
    sets: torch.Tensor
    offset: tuple[torch.Tensor, ...]
    where_open: tuple[torch.Tensor, ...]
    where_shut: tuple[torch.Tensor, ...]

    def of_children(self, child: torch.Tensor, level: int) -> torch.Tensor:
        """The most that is added below children of nodes of a level. Shape: (B, Q, C) -> (B, Q, C) float32."""
        parts = zip(self.offset, self.where_open, self.where_shut, strict=True)
        return torch.stack([
            _chosen(read_bits(self.sets, offset, child, self.trie.tables[level]), up.unsqueeze(-1), down.unsqueeze(-1))
            for offset, up, down in parts
        ]).sum(0)  # fmt: skip

    def of_leaves(self, leaf: torch.Tensor) -> torch.Tensor:
        """What is added to items, by their leaves; anything for those that are -1. Shape: (B, U) -> (B, U) float32."""
        node, bits = leaf.long() + self.trie.level_start[self.trie.levels], self.sets.view(-1)
        parts = zip(self.offset, self.where_open, self.where_shut, strict=True)
        return torch.stack([_chosen(bits[node + offset], up, down) for offset, up, down in parts]).sum(0)

    def of_items(self, rows: torch.Tensor) -> torch.Tensor:
        """What is added to items, by their catalogue rows; anything for those that are not in the trie."""
        return self.of_leaves(self.trie.leaf[rows])


def _chosen(bits: torch.Tensor, where_open: torch.Tensor, where_shut: torch.Tensor) -> torch.Tensor:
    return torch.where(bits == 0, where_open, where_shut)
