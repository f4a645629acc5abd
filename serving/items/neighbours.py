"""The item graph: for every item the items that follow or resemble it, and the scores that they give a history.

    n(j | history) = sum over the last `max_items` items, t steps back, of (t + 1) ** -recency * w(i_t, j), at least 0
    share(j)       = n(j | history) / sum over all items of n; 0 where that is 0
    log score(j)   = log(share(j) + floor), which older bundles add to the network's score

`training/memory.py` makes w from training interactions and item texts; here it is read and looked up. How the share is
joined to the network's score is known by `serving/search/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from serving.errors import BundleError


@dataclass(frozen=True, slots=True)
class Neighbours:
    """w as flat rows: the neighbours of item i are the entries offsets[i] .. offsets[i + 1] - 1 of n in all.

    offsets: (I + 1,) int64. items: (n,) int32 catalogue rows. weights: (n,) float32; negative ones speak against an
    item. floor: None where no log score is needed.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    recency: float
    floor: float | None = None

    def log_scores(self, histories: Sequence[Sequence[int] | np.ndarray], max_items: int) -> np.ndarray:
        """log score(j). Histories are rows, oldest first; one without neighbours gives all items the same score.

        Shape: (B, I) float32.
        """
        assert self.floor is not None, "these neighbours were made to be mixed by their shares"
        n = self._looked_up(histories, max_items).clip(min=0)
        total = n.sum(1, keepdims=True)
        return np.log(n / np.where(total > 0, total, 1) + self.floor).astype(np.float32)

    def shares(
        self, histories: Sequence[Sequence[int] | np.ndarray], max_items: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """share(j), and what a `Gate` is told of each history. Shapes: (B, I) float32, each feature (B,) float64.

        A history without neighbours has no share and a support of -inf.
        """
        n = self._looked_up(histories, max_items)
        known = np.flatnonzero(n > 0)  # few of (B, I): a history calls up some thousands of items
        value, row = n.ravel()[known], known // n.shape[1]
        total = np.bincount(row, value, minlength=len(n))
        divisor = np.where(total > 0, total, 1)
        share, peak = np.zeros(n.shape, np.float32), np.zeros(len(n))
        share.ravel()[known] = value / divisor[row]
        np.maximum.at(peak, row, value)
        with np.errstate(divide="ignore"):
            support = np.log(total)
        return share, {
            "support": support,
            "peak": peak / divisor,
            "entropy": np.log(divisor) - np.bincount(row, value * np.log(value), minlength=len(n)) / divisor,
            "length": np.log([max(1, min(len(history), max_items)) for history in histories]),
        }

    def _looked_up(self, histories: Sequence[Sequence[int] | np.ndarray], max_items: int) -> np.ndarray:
        """n(j | history), before what is negative counts as 0. Shape: (B, I) float64."""
        recent = [np.asarray(history[-max_items:], np.int64) for history in histories]
        lengths = [len(history) for history in recent]
        rows = np.concatenate(recent)
        steps_back = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # 1 for the newest
        begin, count = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        entry = np.repeat(begin - (count.cumsum() - count), count) + np.arange(count.sum())
        weight = np.repeat(steps_back**-self.recency, count) * self.weights[entry]
        items = len(self.offsets) - 1
        cell = np.repeat(np.repeat(np.arange(len(recent)), lengths) * items, count) + self.items[entry]  # of (B, I)
        n = np.bincount(cell, weight, minlength=len(recent) * items).reshape(len(recent), items)
        return n


def write_neighbours(path: Path, neighbours: Neighbours) -> None:
    """Writes w as safetensors; recency and floor are stated in the bundle's manifest."""
    arrays = {name: torch.from_numpy(getattr(neighbours, name)) for name in ("offsets", "items", "weights")}
    save_file(arrays, path, {"format": "pt"})


def read_neighbours(path: Path, items: int, recency: float, floor: float | None) -> Neighbours:
    """Reads what `write_neighbours` wrote, mapped and not copied. Raises BundleError if it does not fit `items`."""
    stored = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    offsets, rows, weights = stored["offsets"], stored["items"], stored["weights"]
    if not (
        [array.dtype for array in (offsets, rows, weights)] == [np.int64, np.int32, np.float32]
        and offsets.shape == (items + 1,)
        and rows.shape == weights.shape == (offsets[-1],)
        and offsets[0] == 0
        and (np.diff(offsets) >= 0).all()
        and ((rows >= 0) & (rows < items)).all()
        and np.isfinite(weights).all()
        and np.isfinite(recency)
        and (floor is None or 0 < floor <= 1)
    ):
        raise BundleError(f"{path.name} does not contain neighbours of this catalogue; export the bundle again.")
    return Neighbours(offsets, rows, weights, recency, floor)
