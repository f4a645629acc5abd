"""The items that exist, as a trie of flat arrays: breadth-first node ids, so that children are a contiguous range.

Node 0 is the root; the nodes of a level follow each other in the order of their token paths, so a leaf's place among
the leaves is also the place of its item in token order, and every node covers a contiguous range of leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from serving.errors import BundleError


@dataclass(frozen=True, slots=True)
class Trie:
    """All arrays on one device.

    token (N,) int64: the vocabulary id that leads to a node (the root's is 0).
    first_child (N + 1,) int64: the children of node n are the nodes first_child[n] .. first_child[n + 1] - 1.
    first_leaf (N,), last_leaf (N,) int64: node n covers the leaves first_leaf[n] .. last_leaf[n] - 1.
    item (I,) int64: leaf -> catalogue row.
    level_start: level j's nodes are level_start[j] .. level_start[j + 1] - 1; length M + 2.
    max_children: the most children of any node at level j; length M.
    """

    token: torch.Tensor
    first_child: torch.Tensor
    first_leaf: torch.Tensor
    last_leaf: torch.Tensor
    item: torch.Tensor
    level_start: tuple[int, ...]
    max_children: tuple[int, ...]

    @property
    def levels(self) -> int:
        """M, the number of tokens of an item."""
        return len(self.max_children)

    def nodes_at(self, level: int) -> int:
        return self.level_start[level + 1] - self.level_start[level]

    def children(self, node: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Children of nodes of one level, padded to that level's widest.

        Shapes: node (...,) int64 -> ids (..., C) int64 and exists (..., C) bool; padded ids are clamped to valid ones.
        """
        ids = self.first_child[node].unsqueeze(-1) + torch.arange(self.max_children[level], device=node.device)
        exists = ids < self.first_child[node + 1].unsqueeze(-1)
        return ids.clamp(max=self.token.numel() - 1), exists

    def blocked(self, permitted: torch.Tensor) -> torch.Tensor:
        """Nodes with no permitted item below them. Shapes: (..., I) bool by catalogue row -> (..., N) bool.

        Blocking them before the beam is cut is what keeps k items coming back whenever k are permitted.
        """
        counts = torch.nn.functional.pad(permitted[..., self.item].to(torch.int64).cumsum(-1), (1, 0))
        return counts[..., self.last_leaf] == counts[..., self.first_leaf]


def build_trie(tokens: np.ndarray, device: torch.device | str = "cpu") -> Trie:
    """Builds the trie of a catalogue. Shape: tokens (I, M) integers, one row per item, rows distinct.

    Raises BundleError if there is no item or two items share a semantic ID.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.ndim != 2 or tokens.size == 0:
        raise BundleError("The catalogue is empty; give it at least one item with at least one token.")
    count, levels = tokens.shape
    order = np.lexsort(tokens.T[::-1])
    paths = tokens[order]
    # starts[j]: leaves at which a new node of level j begins
    changed = np.zeros(count, dtype=bool)
    changed[0] = True
    starts = [np.array([0])]
    for level in range(levels):
        changed[1:] |= paths[1:, level] != paths[:-1, level]
        starts.append(np.flatnonzero(changed))
    if len(starts[-1]) != count:
        raise BundleError("Two items share one semantic ID; make the IDs unique and export the bundle again.")
    level_start = np.concatenate([[0], np.cumsum([len(s) for s in starts])])
    total = int(level_start[-1])
    token = np.zeros(total, dtype=np.int64)
    first_child = np.full(total + 1, total, dtype=np.int64)
    first_leaf, last_leaf = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    max_children = []
    for level, leaves in enumerate(starts):
        span = slice(level_start[level], level_start[level + 1])
        first_leaf[span] = leaves
        last_leaf[span] = np.append(leaves[1:], count)
        if level:
            token[span] = paths[leaves, level - 1]
        if level < levels:
            below = np.searchsorted(starts[level + 1], leaves)
            first_child[span] = level_start[level + 1] + below
            max_children.append(int(np.diff(np.append(below, len(starts[level + 1]))).max()))

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=device)

    return Trie(
        put(token),
        put(first_child),
        put(first_leaf),
        put(last_leaf),
        put(order),
        tuple(int(n) for n in level_start),
        tuple(max_children),
    )
