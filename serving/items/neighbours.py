"""The item graph: for every item the items that follow or resemble it, and the scores that they give a history.

    n(j | history) = sum over the last `max_items` items, t steps back, of a_t * (t + 1) ** -recency * w(i_t, j),
                     at least 0
    share(j)       = n(j | history) / sum over all items of n; 0 where that is 0

a_t is the weight of the event's type, 1 unless a bundle says otherwise (`BundleSettings.type_weights`).

Only the items that a history touches have a share: thousands at most, whatever the size of the catalogue, and nothing
here computes more than those. `training/memory.py` makes w from training interactions and item texts; here it is read
and looked up. How the share is joined to the network's score is known by `serving/search/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from serving.errors import BundleError
from serving.items.newcomers import Newcomers
from serving.types import EventData

NO_ITEM = np.iinfo(np.int32).max  # behind every catalogue row: pads rows of items and keeps them ascending


@dataclass(frozen=True, slots=True)
class Shares:
    """share(j) of the T items at most that each of B histories touches; all other items have none.

    items: (B, T) int64, catalogue rows, ascending, then NO_ITEM. values: (B, T) float32, 0 there.
    """

    items: np.ndarray
    values: np.ndarray

    def of(self, items: np.ndarray) -> np.ndarray:
        """The shares of some items of each history. Shape: (B, N) catalogue rows -> (B, N) float32."""
        index = np.array([np.searchsorted(row, wanted) for row, wanted in zip(self.items, items, strict=True)])
        index = index.clip(max=self.items.shape[1] - 1)
        is_touched = np.take_along_axis(self.items, index, 1) == items
        return np.where(is_touched, np.take_along_axis(self.values, index, 1), np.float32(0))

    def dense(self, items: int) -> np.ndarray:
        """The shares of a whole catalogue, for comparisons offline. Shape: (B, I) float32."""
        every = np.zeros((len(self.items), items), np.float32)
        row, column = np.nonzero(self.items != NO_ITEM)
        every[row, self.items[row, column]] = self.values[row, column]
        return every


@dataclass(frozen=True, slots=True)
class Neighbours:
    """w as flat rows: the neighbours of item i are the entries offsets[i] .. offsets[i + 1] - 1 of n in all.

    offsets: (I + 1,) int64. items: (n,) int32 catalogue rows. weights: (n,) float32; negative ones speak against an
    item. floor: what older bundles add to a share before its logarithm; None where shares are mixed. newcomers: items
    that have been added since.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray
    recency: float
    floor: float | None = None
    newcomers: Newcomers = field(default_factory=Newcomers, compare=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def shares(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        max_items: int,
        events: Sequence[EventData | None] | None = None,
    ) -> tuple[Shares, dict[str, np.ndarray]]:
        """share(j), and what a `Gate` is told of each history. Histories are rows, oldest first; events: of each.

        A history without neighbours has no share and a support of -inf. Shape of each feature: (B,) float64.
        """
        row, item, value = self._looked_up(histories, max_items, events)
        total = np.bincount(row, value, minlength=len(histories))
        divisor = np.where(total > 0, total, 1)
        peak = np.zeros(len(histories))
        np.maximum.at(peak, row, value)
        with np.errstate(divide="ignore"):
            support = np.log(total)
        features = {
            "support": support,
            "peak": peak / divisor,
            "entropy": np.log(divisor) - np.bincount(row, value * np.log(value), minlength=len(histories)) / divisor,
            "length": np.log([max(1, min(len(history), max_items)) for history in histories]),
        }
        share = value / divisor[row]
        if self.newcomers and len(row):
            row, item, share = self.newcomers.join(row, item, share)
        count = np.bincount(row, minlength=len(histories))
        is_touched = np.arange(max(1, int(count.max(initial=0)))) < count[:, None]
        found = Shares(np.full(is_touched.shape, NO_ITEM, np.int64), np.zeros(is_touched.shape, np.float32))
        found.items[is_touched], found.values[is_touched] = item, share
        return found, features

    def _looked_up(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        max_items: int,
        events: Sequence[EventData | None] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n(j | history) where it is positive: number of the history and item, both ascending, and n, (E,) each."""
        recent = [np.asarray(history[-max_items:], np.int64) for history in histories]
        lengths = [len(history) for history in recent]
        rows = np.concatenate(recent)
        if self.newcomers:
            rows = self.newcomers.counterparts(rows)
        steps_back = np.concatenate([np.arange(length, 0, -1) for length in lengths])  # 1 for the newest
        begin, end = (self.offsets[np.minimum(index, len(self))] for index in (rows, rows + 1))  # none of later items
        count = end - begin
        entry = np.repeat(begin - (count.cumsum() - count), count) + np.arange(count.sum())
        factor = steps_back**-self.recency
        if events is not None:
            of_each = zip(events, lengths, strict=True)
            factor *= np.concatenate([np.ones(n) if e is None else e.weights[-max_items:] for e, n in of_each])
        weight = np.repeat(factor, count) * self.weights[entry]
        owner = np.repeat(np.repeat(np.arange(len(recent)), lengths), count)
        item = self.items[entry]
        order = _by_owner_and_item(owner, item, len(recent))
        row, item = owner[order], item[order]
        starts = np.flatnonzero(np.diff(row * len(self) + item, prepend=-1))  # of the cells of (B, I)
        n = np.add.reduceat(weight[order], starts) if len(starts) else weight
        index = starts[n > 0]
        return row[index], item[index].astype(np.int64), n[n > 0]


def _by_owner_and_item(owner: np.ndarray, item: np.ndarray, owners: int) -> np.ndarray:
    """The stable order by owner, then by item. Shapes: (E,) integers below `owners`, (E,) int32 -> (E,).

    numpy sorts integers of up to 16 bits digit by digit, in a fifth of the time that it takes to compare wider ones.
    """
    return np.lexsort(
        (item.astype(np.uint16), (item >> 16).astype(np.uint16), owner.astype(np.min_scalar_type(owners)))
    )


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
        and rows.min(initial=0) >= 0
        and rows.max(initial=0) < items
        and np.isfinite([weights.min(initial=0), weights.max(initial=0)]).all()  # NaN where there is one
        and np.isfinite(recency)
        and (floor is None or 0 < floor <= 1)
    ):
        raise BundleError(f"{path.name} does not contain neighbours of this catalogue; export the bundle again.")
    return Neighbours(offsets, rows, weights, recency, floor)
