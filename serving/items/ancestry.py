"""The trie read upwards, on the host: from items to their leaves and to the nodes above them. Arrays of numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from serving.items.order import BY_ROW, Order
from serving.items.trie import Trie

MANY = 0.05  # of all items
LEAST_RUN = 256  # leaves on average: to copy shorter runs takes as long as to look up every leaf
MOST_MOVED = 1 / 32  # of all leaves, which are then all looked up
UNUSED = np.iinfo(np.int32).min


class Ancestry:
    """Walks from leaves to the root. Sets of nodes are ascending and distinct, so that a step costs one comparison.

    order: of the values that `by_leaf` receives.
    """

    def __init__(self, trie: Trie, order: Order = BY_ROW) -> None:
        self.levels, self.level_start, self.first_token = trie.levels, trie.level_start, trie.first_token
        self.max_children = trie.max_children
        self.first_leaf, self.leaves_at_most = trie.level_start[trie.levels], len(trie.item)
        self.parent, self.leaf, self.token = (array.cpu().numpy() for array in (trie.parent, trie.leaf, trie.token))
        self._item, self._order = trie.item.cpu().numpy(), order
        self._position = order.positions_of(self._item)
        self._runs = self._find_runs()
        self._is_moved, self._moved = np.zeros(self.leaves_at_most, bool), 0  # leaves that have got other items since

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

    def by_leaf(self, values: np.ndarray) -> np.ndarray:
        """Values of all items, in the order of leaves; at unused leaves they are undefined.

        Shape: (I,) -> (leaves,), I greater than every row in the trie, and than 0.
        """
        if not self._runs:
            found: np.ndarray = torch.from_numpy(values).index_select(0, torch.from_numpy(self._position)).numpy()
            return found  # in half the time of np.take
        found = np.zeros(self.leaves_at_most, values.dtype)
        for leaf, position, length in self._runs:
            found[leaf : leaf + length] = values[position : position + length]
        if self._moved:
            moved = np.flatnonzero(self._is_moved)
            found[moved] = values.take(self._position[moved])
        return found

    def move(self, leaves: np.ndarray) -> None:
        """Learns which items these leaves have by now. Shape: (n,) int64, counted from 0."""
        self._position[leaves] = self._order.positions_of(self._item[leaves])
        self._is_moved[leaves] = True
        self._moved = int(np.count_nonzero(self._is_moved))
        if self._moved > MOST_MOVED * self.leaves_at_most:
            self._runs = []

    def _find_runs(self) -> list[list[int]]:
        """Leaves whose items are one behind the other: per run its first leaf, that one's position, and its length.
        Empty if they are short."""
        leaves = np.arange(self.leaves_at_most, dtype=np.int32)
        shift = np.where(self.leaf.take(self._item) == leaves, self._position - leaves, UNUSED)
        starts = np.flatnonzero(run_starts(shift))
        if len(starts) * LEAST_RUN > self.leaves_at_most:
            return []
        begin, length = starts[:-1], np.diff(starts)
        used: list[list[int]] = np.stack([begin, self._position[begin], length], 1)[shift[begin] != UNUSED].tolist()
        return used

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
