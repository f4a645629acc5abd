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
from itertools import repeat
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
        """share(j), and what a `Gate` receives of each history. Histories are rows, oldest first; events: of each.

        A history without neighbours has no share and a support of -inf. Shape of each feature: (B,) float64.
        """
        of_each = repeat(None, len(histories)) if events is None else events
        touched = [
            self._touched(history[-max_items:], event) for history, event in zip(histories, of_each, strict=True)
        ]
        total, peak, spread = np.array([(n.sum(), n.max(initial=0), n @ np.log(n)) for _, n in touched]).T
        divisor = np.where(total > 0, total, 1)
        with np.errstate(divide="ignore"):
            support = np.log(total)
        features = {
            "support": support,
            "peak": peak / divisor,
            "entropy": np.log(divisor) - spread / divisor,
            "length": np.log([max(1, min(len(history), max_items)) for history in histories]),
        }
        shares = [(item, n / whole) for (item, n), whole in zip(touched, divisor, strict=True)]
        if self.newcomers:
            shares = [self.newcomers.join(item, share) for item, share in shares]
        shape = len(shares), max(1, *(len(item) for item, _ in shares))
        found = Shares(np.full(shape, NO_ITEM, np.int64), np.zeros(shape, np.float32))
        for i, (item, share) in enumerate(shares):
            found.items[i, : len(item)], found.values[i, : len(item)] = item, share
        return found, features

    def _touched(self, history: Sequence[int] | np.ndarray, event: EventData | None) -> tuple[np.ndarray, np.ndarray]:
        """The items whose n(j | history) is positive, ascending, and n. Shapes: (E,) int32, (E,) float64."""
        rows = np.asarray(history, np.int64)
        factor = np.arange(len(rows), 0, -1) ** -self.recency  # of the newest: 1
        if event is not None:
            factor *= event.weights[-len(rows) :]
        if self.newcomers:
            rows = self.newcomers.counterparts(rows)
        begin, end = (self.offsets[np.minimum(index, len(self))] for index in (rows, rows + 1))  # none of later items
        runs = [slice(0), *map(slice, begin.tolist(), end.tolist())]  # the first is empty: there may be no other
        item = np.concatenate([self.items[run] for run in runs])
        weight = np.concatenate([self.weights[run] for run in runs]) * np.repeat(factor, end - begin)
        # numpy sorts integers of up to 16 bits digit by digit, in a third of the time that comparing wider ones takes.
        order = np.lexsort((item.astype(np.uint16), (item >> 16).astype(np.uint16)))
        item = item[order]
        is_first = np.ones(len(item), bool)
        np.not_equal(item[1:], item[:-1], out=is_first[1:])
        starts = np.flatnonzero(is_first)
        n = np.add.reduceat(weight[order], starts) if len(starts) else weight
        is_positive = n > 0
        return item[starts[is_positive]], n[is_positive]


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
