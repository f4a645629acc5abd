"""What the item graph says of items that came after it was made: what it says of those that their texts resemble.

    share(n) = mean of share(m) over the items m that n is like

and in a history n counts as the first of them. The shares of others stay as they are: nothing is normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from serving.items.tokenizer import Codec

LIKE = 8  # items of the graph that a new one is like
COMPARED = 10_000  # items that a text is compared with, at least: a fraction of a millisecond


class Newcomers:
    """Items without a row in the graph. One thread adds while others read."""

    def __init__(self) -> None:
        self._counterpart: dict[int, int] = {}
        # An edge for each item m of the graph, ascending, that an item n is like: m, n, and its part of n's share.
        self._edges = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)

    def __len__(self) -> int:
        return len(self._counterpart)

    def add(self, item: int, like: Sequence[int]) -> None:
        """like: rows of the graph, the nearest first, at least one."""
        known = np.sort(np.asarray(like, np.int64))
        at = np.searchsorted(self._edges[0], known)
        values = known, np.full(len(known), item), np.full(len(known), 1 / len(known))
        self._edges = tuple(map(np.insert, self._edges, (at, at, at), values))  # type: ignore[assignment]
        self._counterpart[item] = like[0]

    def counterparts(self, rows: np.ndarray) -> np.ndarray:
        """The rows with those of newcomers replaced. Shape: (n,) int64, both."""
        return np.array([self._counterpart.get(row, row) for row in rows.tolist()], np.int64)

    def join(self, item: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shares of a history with those of newcomers among them: items, ascending, and their shares.

        Shape: (E,) each, before and after.
        """
        known, newcomer, part = self._edges
        begin, end = (np.searchsorted(known, item, side) for side in ("left", "right"))
        count = end - begin
        edge = np.repeat(begin - (count.cumsum() - count), count) + np.arange(count.sum())
        item = np.concatenate([item, newcomer[edge]])
        share = np.concatenate([share, part[edge] * np.repeat(share, count)])
        order = item.argsort(kind="stable")
        item, share = item[order], share[order]
        first = np.flatnonzero(np.diff(item, prepend=-1))
        return item[first], np.add.reduceat(share, first) if len(first) else share


class QuantizedItems:
    """The items of a bundle where the tokenizer has put them, to compare texts with.

    codes: (I, M) int, of which as many are read as there are codebooks.
    """

    def __init__(self, codec: Codec, codes: np.ndarray) -> None:
        self._codebooks, self._codes = codec.codebooks, codes
        norms = np.zeros(len(codes), np.float32)
        for first in range(0, len(codes), 1 << 16):
            block = torch.from_numpy(codes[first : first + (1 << 16)].astype(np.int64))
            vectors = sum(book[block[:, level]] for level, book in enumerate(codec.codebooks))
            norms[first : first + len(block)] = torch.as_tensor(vectors).square().sum(1).numpy()
        self._half_norms = norms / 2
        self._by_first = np.argsort(codes[:, 0], kind="stable")  # rows, grouped by their first code
        self._begin = np.searchsorted(codes[self._by_first, 0], np.arange(len(codec.codebooks[0]) + 1))

    def nearest(self, latent: torch.Tensor, count: int) -> list[int]:
        """The rows nearest to what the quantizer would quantize, the nearest first. Shape: latent (d,).

        In a large catalogue, of those whose first codes are nearest."""
        rows = self._candidates(latent)
        closeness = -self._half_norms[rows]  # <x, q> - |q|^2 / 2, which orders like -|x - q|^2
        for level, book in enumerate(self._codebooks):
            closeness += (book @ latent).numpy()[self._codes[rows, level]]
        nearest: list[int] = rows[np.lexsort((rows, -closeness))][:count].tolist()
        return nearest

    def _candidates(self, latent: torch.Tensor) -> np.ndarray:
        """The items of the nearest first codes, as many as make COMPARED. Shape: (n,) int64."""
        order = (self._codebooks[0] - latent).norm(dim=1).argsort(stable=True).numpy()
        enough = np.searchsorted((self._begin[order + 1] - self._begin[order]).cumsum(), COMPARED) + 1
        return np.concatenate([self._by_first[self._begin[code] : self._begin[code + 1]] for code in order[:enough]])
