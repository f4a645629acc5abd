"""The contenders of `constraint.py`: five ways to find which tokens may follow a prefix, over the same catalogue.

For a beam of prefixes and the log-probabilities of the next token, each returns the scores of the tokens that may
follow. A prefix is its path as a number in base `CODES`, unless a contender has something better.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Protocol

import numpy as np
import torch

from serving.items.blocked import Blocked
from serving.items.trie import build_trie
from serving.types import NEG_INF

CODES, LEVELS = 256, 4
FIRST_TOKEN = 8  # the vocabulary's first ids are not item tokens
VOCABULARY = FIRST_TOKEN + CODES * LEVELS


def clustered_codes(items: int, seed: int) -> np.ndarray:
    """Distinct semantic IDs, distributed as residual quantizers do: after a prefix few codes are common, many are rare.

    Shape: (items, LEVELS) int32, 0 <= code < CODES. The n-th common code of a prefix is drawn in proportion to
    n ** -0.8, and which code that is differs from prefix to prefix.
    """
    rng = np.random.default_rng(seed)
    weight = np.arange(1, CODES + 1) ** -0.8
    ranks = np.searchsorted(np.cumsum(weight / weight.sum()), (np.arange(2**16) + 0.5) / 2**16).astype(np.int64)
    found = np.empty(0, np.int64)
    while len(found) < items:
        count = int(1.3 * (items - len(found))) + 1000
        path = np.zeros(count, np.int64)
        for _ in range(LEVELS):
            mixed = (path + 1) * 0x9E3779B1 % 2**31
            rank = ranks[rng.integers(0, 2**16, count, np.uint16)]
            path = path * CODES + (rank * (mixed | 1) + (mixed >> 8)) % CODES
        found = np.sort(np.concatenate([found, path]))
        found = found[np.diff(found, prepend=-1) > 0]
    paths = rng.permutation(found)[:items]
    return np.stack([paths // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], 1).astype(np.int32)


def path_numbers(codes: np.ndarray) -> np.ndarray:
    """Paths as numbers. Shape: (..., j) -> (...) int64."""
    numbers: np.ndarray = codes.astype(np.int64) @ CODES ** np.arange(codes.shape[-1] - 1, -1, -1)
    return numbers


def level_of(log_probs: torch.Tensor, level: int) -> torch.Tensor:
    """The log-probabilities of one level's tokens. Shape: (B, Q, V) -> (B, Q, CODES)."""
    first = FIRST_TOKEN + level * CODES
    return log_probs[..., first : first + CODES]


class Contender(Protocol):
    """`nbytes`: size of the structure that it searches."""

    name: str
    note: str
    nbytes: int

    def root(self, batch: int) -> Any:
        """The beam before the first token: one row per request."""
        ...

    def expand(self, log_probs: torch.Tensor, beam: Any, level: int) -> tuple[torch.Tensor, Any]:
        """(B, Q, V) -> scores (B, Q, C), -inf for tokens that may not follow, and the context that `follow` needs."""
        ...

    def follow(self, beam: Any, context: Any, row: torch.Tensor, choice: torch.Tensor) -> Any:
        """The beam of K rows that continue `row` (B, K) with the candidates `choice` (B, K)."""
        ...

    def paths(self, beam: Any) -> torch.Tensor:
        """The numbers of complete paths. Shape: (B, K) int64."""
        ...


class Ours:
    """`serving.items.trie`, with `serving.items.rules` where `blocked` is set."""

    name, note = "ours", "finds the items' rows, takes rules"

    def __init__(self, codes: np.ndarray) -> None:
        tokens = codes + np.arange(LEVELS, dtype=np.int32) * CODES + FIRST_TOKEN
        self.trie = build_trie(tokens)
        self.nbytes = sum(array.nbytes for array in (*self.trie.arrays().values(), *self.trie.tables))
        self.blocked: Blocked | None = None
        self._numbers = torch.from_numpy(path_numbers(codes))

    def root(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1, dtype=torch.int32)

    def expand(self, log_probs: torch.Tensor, beam: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.blocked is None:
            return self.trie.expand(log_probs, beam, level)
        return self.blocked.expand(self.trie, log_probs, beam, level)

    def follow(self, beam: torch.Tensor, child: torch.Tensor, row: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        return child.flatten(1).gather(1, row * child.shape[-1] + choice)

    def paths(self, beam: torch.Tensor) -> torch.Tensor:
        return self._numbers[self.trie.item[beam - self.trie.level_start[LEVELS]]]


class Numbered:
    """Base of the contenders whose beam holds the paths' numbers."""

    name, note, nbytes = "", "", 0

    def root(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1, dtype=torch.int64)

    def follow(self, beam: torch.Tensor, context: Any, row: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        return beam.gather(1, row) * CODES + choice

    def paths(self, beam: torch.Tensor) -> torch.Tensor:
        return beam


class Unconstrained(Numbered):
    """No constraint: what the top-k alone costs. Its answers are not items."""

    name, note = "no constraint", "answers are not items"

    def expand(self, log_probs: torch.Tensor, beam: torch.Tensor, level: int) -> tuple[torch.Tensor, None]:
        return level_of(log_probs, level), None


class DenseMask(Numbered):
    """A byte for every possible path of every level: CODES + CODES^2 + ... bytes, however few items there are."""

    name, note = "dense mask", "256 times as large with one more level"
    GIB = sum(CODES**level for level in range(1, LEVELS + 1)) / 2**30

    def __init__(self, codes: np.ndarray) -> None:
        self._masks = []
        for level in range(LEVELS):
            mask = np.zeros(CODES ** (level + 1), dtype=bool)  # pages that are never written take no memory
            mask[path_numbers(codes[:, : level + 1])] = True
            self._masks.append(torch.from_numpy(mask).view(-1, CODES))
            self.nbytes += mask.nbytes

    def expand(self, log_probs: torch.Tensor, beam: torch.Tensor, level: int) -> tuple[torch.Tensor, None]:
        allowed = self._masks[level].index_select(0, beam.view(-1)).view(*beam.shape, CODES)
        return torch.where(allowed, level_of(log_probs, level), NEG_INF), None


class BinarySearch(Numbered):
    """The sorted numbers of all items: a code may follow a prefix if some number lies between the bounds of both."""

    name, note = "binary search", "over sorted IDs"

    def __init__(self, codes: np.ndarray) -> None:
        self._sorted = torch.from_numpy(np.sort(path_numbers(codes)))
        self.nbytes = self._sorted.nbytes

    def expand(self, log_probs: torch.Tensor, beam: torch.Tensor, level: int) -> tuple[torch.Tensor, None]:
        below = CODES ** (LEVELS - 1 - level)  # paths that continue one code
        bounds = (beam.unsqueeze(-1) * CODES + torch.arange(CODES + 1)) * below
        index = torch.searchsorted(self._sorted, bounds)
        return torch.where(index.diff() > 0, level_of(log_probs, level), NEG_INF), None


class HashSet(Numbered):
    """A Python set of the prefixes of each level, queried for every code of every row."""

    name, note = "hash set", "Python's"

    def __init__(self, codes: np.ndarray) -> None:
        self._sets = [set(path_numbers(codes[:, : level + 1]).tolist()) for level in range(LEVELS)]
        self.nbytes = sum(sys.getsizeof(part) + sum(map(sys.getsizeof, part)) for part in self._sets)

    def expand(self, log_probs: torch.Tensor, beam: torch.Tensor, level: int) -> tuple[torch.Tensor, None]:
        known = self._sets[level]
        allowed = [
            [number in known for number in range(prefix * CODES, (prefix + 1) * CODES)]
            for prefix in beam.view(-1).tolist()
        ]
        return torch.where(torch.tensor(allowed).view(*beam.shape, CODES), level_of(log_probs, level), NEG_INF), None


class DictTrie:
    """Nested dicts, one level per code: the usual `prefix_allowed_tokens_fn`. A beam holds nodes and paths."""

    name, note = "dict trie", "Python's"

    def __init__(self, codes: np.ndarray) -> None:
        self._root: dict[int, Any] = {}
        gc.disable()  # else it scans millions of dicts again and again
        for part in np.array_split(codes, 1 + len(codes) // 100_000):
            for a, b, c, d in part.tolist():
                self._root.setdefault(a, {}).setdefault(b, {}).setdefault(c, {})[d] = None
        gc.enable()
        self.nbytes = self._size(self._root)

    def _size(self, node: dict[int, Any] | None) -> int:
        return 0 if node is None else sys.getsizeof(node) + sum(map(self._size, node.values()))

    def root(self, batch: int) -> list[list[Any]]:
        return [[(self._root, 0)] for _ in range(batch)]

    def expand(self, log_probs: torch.Tensor, beam: list[list[Any]], level: int) -> tuple[torch.Tensor, None]:
        nodes = [node for row in beam for node, _ in row]
        allowed = torch.tensor([code for node in nodes for code in node])
        rows = torch.arange(len(nodes)).repeat_interleave(torch.tensor([len(node) for node in nodes]))
        scores = level_of(log_probs, level)
        mask = torch.full(scores.shape, NEG_INF)
        mask.view(-1, CODES)[rows, allowed] = 0
        return scores + mask, None

    def follow(self, beam: list[list[Any]], context: None, row: torch.Tensor, choice: torch.Tensor) -> list[list[Any]]:
        return [
            [(nodes[q][0].get(c, {}), nodes[q][1] * CODES + c) for q, c in zip(rows, codes, strict=True)]
            for nodes, rows, codes in zip(beam, row.tolist(), choice.tolist(), strict=True)
        ]

    def paths(self, beam: list[list[Any]]) -> torch.Tensor:
        return torch.tensor([[number for _, number in row] for row in beam])
