"""The trie read upwards, on the host: from items to their leaves and to the nodes above them. Arrays of numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from serving.items.trie import Trie

MANY = 0.05  # of all items


class Ancestry:
    """Walks from leaves to the root. Sets of nodes are ascending and distinct, so that a step costs one comparison."""

    def __init__(self, trie: Trie) -> None:
        self.levels, self.level_start, self.first_token = trie.levels, trie.level_start, trie.first_token
        self.first_leaf, self.leaves_at_most = trie.level_start[trie.levels], len(trie.item)
        self.parent, self.leaf, self.token = (array.cpu().numpy() for array in (trie.parent, trie.leaf, trie.token))
        self._item = trie.item.cpu()

    def leaves(self, rows: np.ndarray) -> np.ndarray:
        """The nodes of those items that are in the trie.

        Shape: (n,) catalogue rows, repeated or not -> (n',) int32, ascending and distinct.
        """
        known = rows[rows < len(self.leaf)]  # the catalogue may already have rows for which this trie has no room
        if len(known) > MANY * self.leaves_at_most:  # a pass over all leaves takes less than sorting so many
            is_in = np.zeros(self.leaves_at_most + 1, bool)
            is_in[self.leaf.take(known)] = True  # those that are not in the trie, -1, mark the last
            return np.flatnonzero(is_in[:-1]).astype(np.int32) + np.int32(self.first_leaf)
        nodes = np.sort(self.leaf.take(known))  # np.unique takes five times as long
        distinct: np.ndarray = nodes[run_starts(nodes)[:-1]]
        return distinct[distinct >= 0] + np.int32(self.first_leaf)

    def by_leaf(self, of_rows: np.ndarray) -> np.ndarray:
        """What is said of catalogue rows, in the order of leaves; of unused leaves it says anything.

        Shape: (n,) -> (leaves,), n greater than every row in the trie, and than 0.
        """
        said: np.ndarray = torch.from_numpy(of_rows).index_select(0, self._item).numpy()  # half the time of np.take
        return said

    def parents(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parents of distinct nodes of one level, ascending, and how many of them each has.

        Shapes: (n,) -> (n',), (n',).
        """
        parent = self.parent.take(nodes)  # half the time of indexing with brackets
        if (parent[1:] < parent[:-1]).any():  # siblings that were added later lie apart
            parent.sort()
        starts = np.flatnonzero(run_starts(parent))
        return parent.take(starts[:-1]), starts[1:] - starts[:-1]

    def with_ancestors(self, nodes: np.ndarray) -> Iterator[np.ndarray]:
        """Leaves and all nodes above them, level by level."""
        yield nodes
        for _ in range(self.levels):
            nodes, _ = self.parents(nodes)
            yield nodes

    def with_emptied(self, nodes: np.ndarray, open_children: np.ndarray) -> Iterator[np.ndarray]:
        """Blocked leaves and the nodes above them that have no open child left, level by level.

        open_children: (number of inner nodes,) counts from which the blocked nodes are not yet subtracted.
        """
        yield nodes
        for _ in range(self.levels):
            if not len(nodes):
                return
            parents, blocked = self.parents(nodes)
            nodes = parents.compress(blocked == open_children.take(parents))
            yield nodes

    def table_cells(self, nodes: np.ndarray | slice, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the trie's table of `level` has these nodes of the next level: row and column. Shape: (n,) each."""
        return self.parent[nodes] - self.level_start[level], self.token[nodes] - self.first_token[level]


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin, and the end. Shape: (n,) -> (n + 1,) bool."""
    starts = np.ones(len(values) + 1, dtype=bool)
    np.not_equal(values[1:], values[:-1], out=starts[1:-1])
    return starts
