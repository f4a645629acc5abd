"""Business rules inside the search: which nodes of the trie have no permitted item at or below them.

Blocking such nodes before the beam is cut is what keeps k items coming back whenever k are permitted. The work grows
with a request's own lists, not with the catalogue: from the leaves of a list upwards, a node is blocked once as many
of its children are blocked as were open. What many requests share, a named subset or some categories, is prepared
once: a bit per node, the number of open children per node, on which a request's own lists then build, and bits in the
order of the trie's tables, which take the place of the trie's own mask, so that a search with them costs no more.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from serving.items.trie import Part, Trie, minus_inf, unpacked_bytes
from serving.types import Rules

NO_RULES, NOBODY = Rules(), np.empty(0, np.int32)
# What prepared sets may take: about 300 sets over 50,000 items, 50 over a million, or 10 over ten million.
SET_BYTES = 256 << 20
# Bytes per node that a set may take for one table: the first levels' fit as floats, the next as bits, and where the
# catalogue is small, the last ones are nearly empty and not worth it.
TABLE_BYTES = 8
MOST_SETS = 1024


@dataclass(frozen=True, slots=True)
class Blocked:
    """What a batch of searches may not reach. The tensors are views of buffers that a `RuleBook` updates in place.

    Bits are int8, 0 or -1. Rows of them are W longer than the trie has nodes, so that a run of W can be read from any
    node, and are found by where they begin, counted through all rows: own_at, set_at (B, 1) int64.
    own (B, N + W) bits: nodes that a request's own lists block; or, where `inverted` (B, 1) bits is -1, all that it
    permits. (B, 0) where no request has lists.
    sets (R, N + W) bits: nodes that a prepared set blocks; the first row blocks none, and is alone where no request has
    a set. parts, one per level: what the sets leave of it; None where it has to be read node by node.
    """

    own: torch.Tensor
    own_at: torch.Tensor
    inverted: torch.Tensor
    sets: torch.Tensor
    set_at: torch.Tensor
    parts: tuple[Part | None, ...]

    @property
    def reads(self) -> tuple[bool, bool]:
        """Whether any request has lists of its own, and whether any has a prepared set."""
        return self.own.shape[1] > 0, self.sets.shape[0] > 1

    def expand(
        self, trie: Trie, log_probs: torch.Tensor, node: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Trie.expand`, with -inf also where no permitted item is at or below a child."""
        lists, sets = self.reads
        part = self.parts[level] if sets else None
        scores, child = trie.expand(log_probs, node, level, part)
        if lists:
            bits = _read(self.own, self.own_at, child, trie.tables[level])
            scores = scores + minus_inf(bits ^ self.inverted.unsqueeze(-1))
        if sets and part is None:
            scores = scores + minus_inf(_read(self.sets, self.set_at, child, trie.tables[level]))
        return scores, child

    def items(self, trie: Trie) -> torch.Tensor:
        """Which items are not permitted. Shape: (B, I) bool by catalogue row."""
        node = trie.leaf.to(torch.int64) + trie.level_start[trie.levels]
        bits = self.sets.view(-1)[node + self.set_at]
        if self.reads[0]:
            bits |= self.own[:, node] ^ self.inverted
        return bits.bool()


def _read(rows: torch.Tensor, at: torch.Tensor, child: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The bits of children, which are runs if there is no table. Shape: (n, N + W), (B, 1), (B, Q, C) -> (B, Q, C)."""
    if not table.numel():
        return F.embedding(child[..., 0] + at, rows.view(-1).unfold(0, child.shape[-1], 1))
    place = child + at.unsqueeze(-1)
    return rows.view(-1).index_select(0, place.view(-1)).view(child.shape)


def no_sets(rules: Rules) -> np.ndarray:
    raise ValueError(f"There are no named subsets or categories here, so {rules} has no meaning.")


class RuleBook:
    """Turns the rules of a batch into a `Blocked`. One batch at a time: its buffers are used again.

    members: the catalogue rows that a request's named subset and categories leave (`Catalogue.members`).
    rows: the widest batch to come. A wider one gets new buffers, so whoever records a search has to say it beforehand.
    """

    def __init__(
        self,
        trie: Trie,
        members: Callable[[Rules], np.ndarray] = no_sets,
        *,
        rows: int = 1,
        set_bytes: int = SET_BYTES,
    ) -> None:
        self._members = members
        self._first_leaf, self._levels = trie.level_start[trie.levels], trie.levels
        self._parent, self._leaf = trie.parent.cpu().numpy(), trie.leaf.cpu().numpy()
        self._token, self._level_start, self._first_token = trie.token.cpu().numpy(), trie.level_start, trie.first_token
        self._device = trie.token.device
        counts = np.min_scalar_type(max(trie.max_children))
        tables = [_table_of_set(trie, level) for level in range(trie.levels)]
        self._width = trie.nodes + max(trie.max_children)
        set_size = self._width + counts.itemsize * self._first_leaf + sum(table.nbytes for table in tables)
        sets = min(MOST_SETS, 1 + set_bytes // set_size)
        # np.zeros takes no memory until it is written to, and most of these rows never are.
        self._set_bits = np.zeros((sets, self._width), dtype=np.int8)
        self._open_children = np.zeros((sets, self._first_leaf), dtype=counts)
        self._open_children[0] = np.diff(trie.first_child.cpu().numpy())
        self._table_bits = [np.zeros((sets, *table.shape), table.dtype) for table in tables]
        for level in range(trie.levels):
            self._open_in_table(0, level, np.arange(*trie.level_start[level + 1 : level + 3], dtype=np.int32))
        self._prepared: OrderedDict[tuple[str | None, frozenset[str]], int] = OrderedDict()  # least recently used first
        self._sets = torch.from_numpy(self._set_bits).to(self._device)
        self._tables = [torch.from_numpy(bits).to(self._device) for bits in self._table_bits]
        # by level, what a part has to be given, and what leads from a node to its row there and, at last, in all bits
        self._parts: list[torch.Tensor | None] = [None] * trie.levels
        strides, starts = [self._width] * (trie.levels + 1), [0] * (trie.levels + 1)
        for level, table in enumerate(self._tables):
            if table.numel():
                self._parts[level] = table.flatten(0, 1)
                strides[level], starts[level] = table.shape[1], trie.level_start[level]
            elif not trie.tables[level].numel():
                self._parts[level] = self._sets.view(-1).unfold(0, trie.max_children[level], 1)
        self._set_places = (np.arange(sets)[:, None] * np.array(strides) - np.array(starts)).tolist()
        self._unpacked = unpacked_bytes().to(self._device)
        self._busy = False
        self._make_room(rows)

    def prepare(self, rules: Sequence[Rules]) -> None:
        """Makes the sets that these rules name, so that no request waits for it: the first ones, as many as fit."""
        for rule in rules[: len(self._set_bits) - 1]:
            self._prepare(rule, set())

    @contextmanager
    def blocked(self, rules: Sequence[Rules]) -> Iterator[Blocked | None]:
        """What the rules block, for as long as the context is open; None where there are no rules at all.

        Raises what `members` raises; nothing is left behind then, nor when the search raises.
        """
        if all(rule == NO_RULES for rule in rules):
            yield None
            return
        if self._busy:
            raise RuntimeError("The rules of another batch are still in use; leave their context first.")
        if len(rules) > len(self._own):
            self._make_room(1 << (len(rules) - 1).bit_length())
        batch = len(rules)
        in_use: set[int] = set()
        marks = [self._mark(rule, in_use) for rule in rules]
        lists, sets = any(len(nodes) or inverted for nodes, inverted, _ in marks), any(slot for _, _, slot in marks)
        self._busy = True
        self._fill(self._set_at, self._host_set_at, [self._set_places[slot] for _, _, slot in marks])
        if lists:
            self._fill(self._inverted, self._host_inverted, [[-inverted] for _, inverted, _ in marks])
            places = np.concatenate([nodes + np.int64(row) * self._width for row, (nodes, _, _) in enumerate(marks)])
            self._write(places, -1)
        try:
            yield self._view(batch, lists, sets)
        finally:
            if lists:
                self._write(places, 0)
            self._busy = False

    def _view(self, batch: int, lists: bool, sets: bool) -> Blocked:
        """The buffers as a batch reads them, which is always the same; to make so many views takes 20 us."""
        view = self._views.get((batch, lists, sets))
        if view is None:
            *at, set_at = torch.split(self._set_at[:batch], 1, 1)
            view = self._views[batch, lists, sets] = Blocked(
                self._own[:batch] if lists else self._own[:batch, :0],
                self._own_at[:batch],
                self._inverted[:batch],
                self._sets if sets else self._sets[:1],
                set_at,
                tuple(
                    None if bits is None else Part(bits, places, self._unpacked)
                    for bits, places in zip(self._parts, at, strict=True)
                ),
            )
        return view

    def _fill(self, buffer: torch.Tensor, host: np.ndarray, rows: Sequence[Sequence[int]]) -> None:
        """Sets the first rows of a buffer; on the CPU `host` is its memory."""
        host[: len(rows)] = rows
        if self._device.type != "cpu":
            buffer.copy_(torch.from_numpy(host))

    def _write(self, places: np.ndarray, bit: int) -> None:
        """Sets places of the requests' own rows, counted through all rows. Shape: (n,) int64."""
        if self._device.type == "cpu":
            self._own.numpy().reshape(-1)[places] = bit  # the same memory; torch's index_fill takes ten times as long
        else:
            self._own.view(-1).index_fill_(0, torch.from_numpy(places).to(self._device), bit)

    def _mark(self, rule: Rules, in_use: set[int]) -> tuple[np.ndarray, bool, int]:
        """The nodes to mark in a request's own row, whether they are those it permits, and the row of its set."""
        denied = self._leaves(_array(rule.exclude + rule.deny)) if rule.exclude or rule.deny else NOBODY
        allowed = None if rule.allow is None else self._leaves(_array(rule.allow))
        slot = 0
        if rule.catalogue is not None or rule.categories:
            slot = self._prepare(rule, in_use)
            if not slot:  # this very batch holds all rows: the set is a list like any other
                members = self._leaves(self._members(rule))
                allowed = members if allowed is None else np.intersect1d(allowed, members, assume_unique=True)
        if allowed is None and not len(denied):  # a set alone: what is prepared says it all
            return NOBODY, False, slot
        if slot:
            outside = self._set_bits[slot]
            denied = denied[outside[denied] == 0]
            allowed = None if allowed is None else allowed[outside[allowed] == 0]
        if allowed is not None:
            return np.concatenate(list(self._ancestry(np.setdiff1d(allowed, denied, assume_unique=True)))), True, 0
        return np.concatenate(list(self._emptied(denied, self._open_children[slot]))), False, slot

    def _ancestry(self, nodes: np.ndarray) -> Iterator[np.ndarray]:
        """Leaves and all that is above them, level by level. Shape: (n,), ascending and distinct -> (n',) each."""
        yield nodes
        for _ in range(self._levels):
            nodes, _ = self._parents(nodes)
            yield nodes

    def _emptied(self, nodes: np.ndarray, open_children: np.ndarray) -> Iterator[np.ndarray]:
        """Leaves that are closed, and what is above them and has no open child left, level by level."""
        yield nodes
        for _ in range(self._levels):
            if not len(nodes):
                return
            parents, closed = self._parents(nodes)
            nodes = parents.compress(closed == open_children.take(parents))
            yield nodes

    def _prepare(self, rule: Rules, in_use: set[int]) -> int:
        """The row of the request's named subset and categories, made if it is not there; 0 if there is no room."""
        key = rule.catalogue, frozenset(rule.categories)
        slot = self._prepared.get(key)
        if slot is None:
            nodes = self._leaves(self._members(rule))
            slot = self._free_row(in_use)
            if not slot:
                return 0
            bits, open_children = self._set_bits[slot], self._open_children[slot]
            bits[:], open_children[:] = -1, 0
            bits[nodes] = 0
            for level in reversed(range(self._levels)):
                self._open_in_table(slot, level, nodes)
                nodes, children = self._parents(nodes)
                bits[nodes], open_children[nodes] = 0, children
            self._sets[slot].copy_(torch.from_numpy(bits))
            for table, of_table in zip(self._tables, self._table_bits, strict=True):
                table[slot].copy_(torch.from_numpy(of_table[slot]))
            self._prepared[key] = slot
        self._prepared.move_to_end(key)
        in_use.add(slot)
        return slot

    def _open_in_table(self, slot: int, level: int, nodes: np.ndarray) -> None:
        """Says of a set which children a level's nodes have. Shape: (n,) nodes of the next level, ascending."""
        table = self._table_bits[level][slot]
        if not table.size:
            return
        row = self._parent.take(nodes) - self._level_start[level]
        code = self._token.take(nodes) - self._first_token[level]
        if table.dtype == np.float32:
            table[:] = -np.inf
            table[row, code] = 0
            return
        table[:] = 0xFF
        place = row * np.int64(table.shape[1]) + (code >> 3)
        first = np.flatnonzero(_borders(place)[:-1])
        opened = np.bitwise_or.reduceat(np.left_shift(1, code & 7).astype(np.uint8), first)
        table.reshape(-1)[place[first]] = ~opened

    def _free_row(self, in_use: set[int]) -> int:
        if len(self._prepared) + 1 < len(self._set_bits):
            return len(self._prepared) + 1
        for key, slot in self._prepared.items():
            if slot not in in_use:
                del self._prepared[key]
                return slot
        return 0

    def _leaves(self, rows: np.ndarray) -> np.ndarray:
        """The nodes of items. Shape: (n,) catalogue rows, repeated or not -> (n',) int32, ascending and distinct."""
        nodes = np.sort(self._leaf.take(rows))  # np.unique takes five times as long
        distinct: np.ndarray = nodes[_borders(nodes)[:-1]]
        return distinct + np.int32(self._first_leaf)

    def _parents(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parents of ascending nodes of one level, and how many of them each has. Shapes: (n,) -> (n',), (n',)."""
        parent = self._parent.take(nodes)  # half the time of an index in brackets
        borders = np.flatnonzero(_borders(parent))
        return parent.take(borders[:-1]), borders[1:] - borders[:-1]

    def _make_room(self, rows: int) -> None:
        self._views: dict[tuple[int, bool, bool], Blocked] = {}  # by batch, and whether lists and sets are read
        with torch.inference_mode(False):  # written to by later calls, inside of it or not
            if self._device.type == "cpu":
                self._own = torch.from_numpy(np.zeros((rows, self._width), dtype=np.int8))
            else:
                self._own = torch.zeros(rows, self._width, dtype=torch.int8, device=self._device)
            self._own_at = torch.arange(rows, device=self._device).unsqueeze(1) * self._width
            self._host_inverted = np.zeros((rows, 1), np.int8)
            self._host_set_at = np.zeros((rows, self._levels + 1), np.int64)
            self._inverted = torch.from_numpy(self._host_inverted).to(self._device)
            self._set_at = torch.from_numpy(self._host_set_at).to(self._device)


def _table_of_set(trie: Trie, level: int) -> np.ndarray:
    """What a set needs of a level's table, one row: as floats where that is small, as bits, or nothing of it."""
    nodes, tokens = trie.nodes_at(level), trie.tokens[level]
    if trie.tables[level].numel():
        for row in (np.zeros(tokens, np.float32), np.zeros(-(-tokens // 8), np.uint8)):
            if nodes * row.nbytes <= TABLE_BYTES * trie.nodes:
                return np.broadcast_to(row, (nodes, len(row)))
    return np.zeros((nodes, 0), np.uint8)


def _array(rows: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(struct.pack(f"{len(rows)}q", *rows), np.int64)  # 40% less than by np.fromiter


def _borders(values: np.ndarray) -> np.ndarray:
    """Where a run of equal values begins, and the end. Shape: (n,) -> (n + 1,) bool."""
    borders = np.ones(len(values) + 1, dtype=bool)
    np.not_equal(values[1:], values[:-1], out=borders[1:-1])
    return borders
