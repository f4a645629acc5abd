"""A memory of the log and the texts: for every item the items that follow or resemble it, and what a history calls up.

    n(j | history) = sum over the last `max_items` items, t steps back, of (t + 1) ** -recency * w(i_t, j)
    log score(j)   = log(n(j | history) / sum over all items of n + floor)

How w is made from training interactions and item texts is in `training/neighbours.py`; here it is read and looked up.
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
    """w as flat rows. Entries offsets[i] to offsets[i + 1] are those of item i; E in all.

    offsets: (I + 1,) int64. items: (E,) int32 catalogue rows. weights: (E,) float32, not negative.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    recency: float
    floor: float

    def log_scores(self, histories: Sequence[Sequence[int] | np.ndarray], max_items: int) -> np.ndarray:
        """Histories: rows, oldest first; one that calls up nothing scores all alike. Returns (B, I) float32."""
        recent = [np.asarray(history[-max_items:], np.int64) for history in histories]
        lengths = [len(history) for history in recent]
        rows = np.concatenate(recent)
        steps_back = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # 1 for the newest
        begin, count = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        entry = np.repeat(begin - (count.cumsum() - count), count) + np.arange(count.sum())
        weight = np.repeat(steps_back**-self.recency, count) * self.weights[entry]
        items = len(self.offsets) - 1
        place = np.repeat(np.repeat(np.arange(len(recent)), lengths) * items, count) + self.items[entry]
        n = np.bincount(place, weight, minlength=len(recent) * items).reshape(len(recent), items)
        total = n.sum(1, keepdims=True)
        return np.log(n / np.where(total > 0, total, 1) + self.floor).astype(np.float32)


def write_neighbours(path: Path, neighbours: Neighbours) -> None:
    """Writes w as safetensors; recency and floor stand in the bundle's manifest."""
    arrays = {name: torch.from_numpy(getattr(neighbours, name)) for name in ("offsets", "items", "weights")}
    save_file(arrays, path, {"format": "pt"})


def read_neighbours(path: Path, items: int, recency: float, floor: float) -> Neighbours:
    """Reads what `write_neighbours` wrote, mapped and not copied. Raises BundleError where it does not fit."""
    stored = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    found = Neighbours(stored["offsets"], stored["items"], stored["weights"], recency, floor)
    offsets, rows, weights = found.offsets, found.items, found.weights
    kinds = [array.dtype for array in (offsets, rows, weights)]
    if not (
        kinds == [np.int64, np.int32, np.float32]
        and offsets.shape == (items + 1,)
        and rows.shape == weights.shape == (offsets[-1],)
        and offsets[0] == 0
        and (np.diff(offsets) >= 0).all()
        and ((rows >= 0) & (rows < items)).all()
        and (np.isfinite(weights) & (weights >= 0)).all()
        and np.isfinite(recency)
        and 0 < floor <= 1
    ):
        raise BundleError(f"{path.name} holds no neighbours of this catalogue; export the bundle again.")
    return found
