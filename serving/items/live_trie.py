"""A trie whose items come and go between two searches: the flat arrays, with unused ids at the end of every level.

Nothing is built anew for an item. One that is added takes unused ids, and where children are a run without room, the
run moves to a longer one. One that is removed leaves with all nodes that only led to it, and their ids are used again.
At all times the trie is that of the items in it, and a search sees what it would see in one built from them; only node
ids differ, and with them the order of items with exactly equal scores. Once ids run out, a new trie is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from serving.errors import BundleError
from serving.items.trie import TABLE_ENTRIES, Trie, build_trie

RUN_ROOM = 4  # unused ids per item to come, where runs move: they leave their old ids to others
WIDER = 4  # children that a run may have beyond the most of any; searches read so many more


class TrieFull(Exception):
    """No id, no catalogue row or no child is left for one more item; the trie has to be built again, with more room."""


class Move(NamedTuple):
    """`length` nodes from `old` on got the ids from `new` on; both ranges may overlap."""

    old: int
    new: int
    length: int


class LiveTrie:
    """tokens (I', M) and rows (I',): the items to begin with, and their catalogue rows. level_ranges: [first, end) of
    the ids at every level, see `Vocabulary.level_ranges`. room: items that may be added; catalogue rows count up to
    `capacity`. Not thread-safe.

    trie: on the device, with as many rows as `capacity`. host: on the CPU, where it is the same; changes are made there
    and reach the device by `flush`. on_move: called whenever nodes have got other ids.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        rows: np.ndarray,
        level_ranges: Sequence[tuple[int, int]],
        *,
        capacity: int,
        room: int,
        device: torch.device | str = "cpu",
        table_entries: int = TABLE_ENTRIES,
    ) -> None:
        levels, spans = len(level_ranges), [end - first for first, end in level_ranges]
        sizes, most_children = [1, *[0] * levels], (0,) * levels
        compact = build_trie(tokens, table_entries=0) if len(rows) else None
        if compact is not None:
            sizes, most_children = [compact.nodes_at(level) for level in range(levels + 1)], compact.max_children
        has_table: list[bool] = []
        ids = [1]  # of every level, used or not
        for level, span in enumerate(spans):
            # Tables come before runs, so that the nodes that a run moves have none themselves.
            has_table.append(all(has_table) and ids[level] * span <= table_entries)
            unused = room if has_table[-1] else RUN_ROOM * room
            ids.append(
                min(sizes[level + 1] + unused, ids[level] * span) if has_table[-1] else sizes[level + 1] + unused
            )
        starts: list[int] = [0, *np.cumsum(ids).tolist()]
        widths = [
            span if table else min(span, most + WIDER)
            for table, span, most in zip(has_table, spans, most_children, strict=True)
        ]
        if starts[-1] + max(widths) > np.iinfo(np.int32).max:
            raise BundleError("The catalogue's trie has more than 2^31 nodes; split the catalogue.")
        nodes, inner = starts[-1], starts[levels]
        self._first_leaf = inner
        self.token = np.zeros(nodes + max(widths), np.int32)
        self.parent = np.zeros(nodes, np.int32)
        self.children = np.zeros((inner, 2), np.int32)
        self.item = np.zeros(ids[levels], np.int32)
        self.leaf = np.full(capacity, -1, np.int32)
        self.tables = [
            np.full((ids[level], span) if has_table[level] else (0,), -1, np.int32) for level, span in enumerate(spans)
        ]
        self._run_room = np.zeros(inner, np.int32)  # ids that a node's run may use
        self._begin = [start + size for start, size in zip(starts, sizes, strict=False)]  # of the ids never used
        self._end = starts[1:]
        # At the beginning; none where all ids that there could be are there.
        self._unused = [end - begin for begin, end in zip(self._begin, self._end, strict=True)]
        for level, span in enumerate(spans):
            if has_table[level] and ids[level + 1] == ids[level] * span:
                self._unused[level + 1] = 0
        self._free: list[dict[int, list[int]]] = [{} for _ in ids]  # per level: length of a block -> where such begin
        self.host = Trie(
            torch.from_numpy(self.token),
            torch.from_numpy(self.parent),
            torch.from_numpy(self.children),
            torch.from_numpy(self.item),
            torch.from_numpy(self.leaf),
            tuple(torch.from_numpy(table) for table in self.tables),
            tuple(starts),
            tuple(first for first, _ in level_ranges),
            tuple(spans),
            tuple(widths),
        )
        if compact is not None:
            self._fill(compact, np.asarray(rows), starts)
        self.trie = self.host if torch.device(device).type == "cpu" else self.host.to(device)
        self.on_move: Callable[[Move], None] = lambda move: None
        self._touched: set[int] = set()  # nodes that the device does not know
        self._touched_rows: set[int] = set()

    def _fill(self, compact: Trie, rows: np.ndarray, starts: list[int]) -> None:
        """Copies a trie without unused ids."""
        token, parent, children = (array.numpy() for array in (compact.token, compact.parent, compact.children))
        shift = [new - old for new, old in zip(starts, compact.level_start, strict=False)]
        for level in range(compact.levels + 1):
            old = slice(compact.level_start[level], compact.level_start[level + 1])
            new = slice(old.start + shift[level], old.stop + shift[level])
            self.token[new] = token[old]
            if level:
                self.parent[new] = parent[old] + shift[level - 1]
                table = self.tables[level - 1]
                if table.size:
                    column = self.token[new] - self.host.first_token[level - 1]
                    table[self.parent[new] - starts[level - 1], column] = np.arange(new.start, new.stop)
            if level < compact.levels and not self.tables[level].size:
                self.children[new] = children[old] + shift[level + 1]
                self._run_room[new] = children[old, 1] - children[old, 0]
        self.item[: len(rows)] = rows[compact.item.numpy()]
        self.leaf[rows] = compact.leaf.numpy()

    def __contains__(self, row: int) -> bool:
        return row < len(self.leaf) and bool(self.leaf[row] >= 0)

    def node_of(self, row: int) -> int:
        """The leaf of an item that is in the trie, as a node."""
        return int(self.leaf[row]) + self._first_leaf

    @property
    def room(self) -> float:
        """How much of the unused ids is left, 0..1, at the level that has the least. Ids given back do not count."""
        levels = zip(self._begin, self._end, self._unused, strict=True)
        return min(((end - begin) / unused for begin, end, unused in levels if unused), default=1.0)

    def add(self, row: int, tokens: Sequence[int]) -> None:
        """Adds an item. Raises TrieFull, and ValueError if another item has these tokens; then it is not added."""
        if row >= len(self.leaf):
            raise TrieFull
        node = 0
        for level, token in enumerate(tokens):
            child = self._find(node, level, token)
            if child is None:
                try:
                    child = self._add_child(node, level, token)
                except TrieFull:
                    self._prune(node, level)
                    raise
            elif level + 1 == len(tokens):
                raise ValueError("another item has this semantic ID")
            node = child
        self.item[node - self._first_leaf], self.leaf[row] = row, node - self._first_leaf
        self._touched_rows.add(row)

    def remove(self, row: int) -> None:
        """Removes an item, and the nodes that only led to it."""
        node = self.node_of(row)
        self.leaf[row] = -1
        self._touched_rows.add(row)
        self._prune(node, self.host.levels)

    def _prune(self, node: int, level: int) -> None:
        """Removes a node of a level, and those above it, as long as they have no children."""
        while level > 0 and not (level < self.host.levels and self._has_children(node, level)):
            parent, level = int(self.parent[node]), level - 1
            self._remove_child(parent, level, node)
            node = parent

    def flush(self) -> np.ndarray:
        """Sends what has changed to the device, where that is not the CPU. Returns the nodes in question."""
        nodes, rows = (np.array(sorted(changed), np.int64) for changed in (self._touched, self._touched_rows))
        self._touched.clear()
        self._touched_rows.clear()
        if self.trie is not self.host:
            host, trie, starts = self.host, self.trie, self.host.level_start
            leaves = nodes[nodes >= self._first_leaf] - self._first_leaf
            pairs: list[tuple[torch.Tensor, torch.Tensor, np.ndarray]] = [
                (trie.token, host.token, nodes),
                (trie.parent, host.parent, nodes),
                (trie.children, host.children, nodes[nodes < self._first_leaf]),
                (trie.item, host.item, leaves),
                (trie.leaf, host.leaf, rows),
            ]
            for level, (on_device, on_host) in enumerate(zip(trie.tables, host.tables, strict=True)):
                if on_host.numel():
                    at_level = (nodes >= starts[level]) & (nodes < starts[level + 1])
                    pairs.append((on_device, on_host, nodes[at_level] - starts[level]))
            for on_device, on_host, index in pairs:
                where = torch.from_numpy(index)
                on_device[where.to(on_device.device)] = on_host[where].to(on_device.device)
        return nodes

    # Children

    def _find(self, node: int, level: int, token: int) -> int | None:
        table = self.tables[level]
        if table.size:
            child = int(table[node - self.host.level_start[level], token - self.host.first_token[level]])
            return child if child >= 0 else None
        start, end = self.children[node].tolist()
        index = start + int(np.searchsorted(self.token[start:end], token))
        return index if index < end and self.token[index] == token else None

    def _has_children(self, node: int, level: int) -> bool:
        table = self.tables[level]
        if table.size:
            return bool((table[node - self.host.level_start[level]] >= 0).any())
        return bool(self.children[node, 1] > self.children[node, 0])

    def _add_child(self, node: int, level: int, token: int) -> int:
        """A new child of a node, at its place in the order of tokens where children are a run."""
        if self.tables[level].size:
            child = self._take(level + 1, 1)
            self.tables[level][node - self.host.level_start[level], token - self.host.first_token[level]] = child
        else:
            start, end = self.children[node].tolist()
            count, room = end - start, int(self._run_room[node])
            if count == self.host.max_children[level]:
                raise TrieFull
            if count == room:
                longer = 1 << count.bit_length()
                new = self._take(level + 1, longer)
                self._move(level + 1, Move(start, new, count))
                self._give_back(level + 1, start, room)
                start, self._run_room[node] = new, longer
            child = start + int(np.searchsorted(self.token[start : start + count], token))
            self._move(level + 1, Move(child, child + 1, start + count - child))
            self.children[node] = start, start + count + 1
        self.token[child], self.parent[child] = token, node
        if level + 1 < self.host.levels:
            self.children[child], self._run_room[child] = 0, 0
        self._touched.update((node, child))
        return child

    def _remove_child(self, node: int, level: int, child: int) -> None:
        self._touched.add(node)
        if self.tables[level].size:
            cell = node - self.host.level_start[level], self.token[child] - self.host.first_token[level]
            self.tables[level][cell] = -1
            self._give_back(level + 1, child, 1)
            return
        start, end = self.children[node].tolist()
        self._move(level + 1, Move(child + 1, child, end - child - 1))
        self.children[node, 1] = end - 1
        if end - 1 == start:
            self._give_back(level + 1, start, int(self._run_room[node]))
            self.children[node], self._run_room[node] = 0, 0

    def _move(self, level: int, move: Move) -> None:
        """Gives the nodes of a run other ids. They have no tables: see `__init__`."""
        old, new, length = move
        if not length:
            return
        source, target = slice(old, old + length), slice(new, new + length)
        arrays: list[np.ndarray] = [self.token, self.parent]
        if level < self.host.levels:
            arrays += [self.children, self._run_room]
        for array in arrays:
            array[target] = array[source].copy()
        if level == self.host.levels:
            rows = self.item[old - self._first_leaf : old - self._first_leaf + length].copy()
            self.item[new - self._first_leaf : new - self._first_leaf + length] = rows
            self.leaf[rows] = np.arange(new, new + length) - self._first_leaf
            self._touched_rows.update(rows.tolist())
        else:
            for node in range(new, new + length):
                start, end = self.children[node].tolist()
                self.parent[start:end] = node
                self._touched.update(range(start, end))
        self._touched.update(range(new, new + length))
        self.on_move(move)

    # Ids

    def _take(self, level: int, length: int) -> int:
        """The first of `length` unused ids of a level, one after the other; a power of two. Raises TrieFull."""
        blocks = self._free[level].get(length)
        if blocks:
            return blocks.pop()
        begin = self._begin[level]
        if begin + length > self._end[level]:
            raise TrieFull
        self._begin[level] = begin + length
        return begin

    def _give_back(self, level: int, start: int, length: int) -> None:
        while length:
            block = 1 << (length.bit_length() - 1)
            self._free[level].setdefault(block, []).append(start)
            start, length = start + block, length - block
