"""Training sequences as examples: every prefix of a user's sequence with its next item, batched by length.

Batches of one length need almost no padding, which is most of what makes training affordable on a CPU. Everything
random follows from (seed, epoch), so that a resumed run sees the batches of an uninterrupted one.

There are two forms. `Examples` has a row per prefix. `Windows` has a row per piece of a user's sequence, and every
item of it but the first few is a target: where the encoder is causal over items, one pass serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """All (history, next item) pairs. An example is a window of one flat array.

    sequence: (events,) int32 item rows of all users. start, target: (E,) int64, the history is sequence[start:target],
    the item to predict sequence[target]. times: (events,) float64, see `EventData`; None: nobody reads them.
    """

    sequence: np.ndarray
    start: np.ndarray
    target: np.ndarray
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def first(self) -> np.ndarray:
        """As in `Windows`, but rows of any length may share a batch. Shape: (E,)."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Targets per row. Shape: (E,)."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def shapes(self) -> np.ndarray:
        """What rows of a batch should have in common, the length. Shape: (E,)."""
        lengths: np.ndarray = self.target - self.start
        return lengths

    def examples(self, index: np.ndarray) -> Examples:
        """The targets of some rows, one after the other."""
        return Examples(self.sequence, self.start[index], self.target[index], self.times)

    def histories(self, index: np.ndarray) -> list[np.ndarray]:
        return [self.sequence[self.start[i] : self.target[i]] for i in index]

    def times_of(self, index: np.ndarray) -> list[np.ndarray] | None:
        """Of the histories' events."""
        return None if self.times is None else [self.times[self.start[i] : self.target[i]] for i in index]

    def targets(self, index: np.ndarray) -> np.ndarray:
        """Shape: (B,) int64."""
        items: np.ndarray = self.sequence[self.target[index]]
        return items.astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Pieces of the sequences with all their targets: what `Examples` holds, several prefixes a row.

    start, first, counts: (R,) int64. A row's items are sequence[start : start + first + count]; its targets are those
    from offset `first` on, each with all items before it as history. The windows of a sequence longer than `max_items`
    overlap by half, so that all but the first targets see half of max_items to max_items items; a service that reads
    the last max_items computes exactly what training did. times: as in `Examples`.
    """

    sequence: np.ndarray
    start: np.ndarray
    first: np.ndarray
    counts: np.ndarray
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def shapes(self) -> np.ndarray:
        """Rows of a batch have one `first`, so that they can share the attention's mask. Shape: (R,)."""
        shapes: np.ndarray = self.first * (self.counts.max() + 1) + self.counts
        return shapes

    def examples(self, index: np.ndarray) -> Examples:
        """The targets of some rows, one after the other; those of a row share the start of their histories."""
        counts = self.counts[index]
        number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # of the target in its row
        start, first = np.repeat(self.start[index], counts), np.repeat(self.first[index], counts)
        return Examples(self.sequence, start, start + first + number, self.times)

    def items(self, index: np.ndarray, targets: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Item rows of windows that have one `first`, and which targets are real, padded to so many targets.

        Shapes: (B, first + targets) int64, padded with item 0, and (B, targets) bool.
        """
        first = int(self.first[index[0]])
        inside, at = self._at(index, first + targets)
        items = np.where(inside, self.sequence[at], 0)
        return items.astype(np.int64), inside[:, first:], first

    def seconds_back(self, index: np.ndarray, targets: int) -> np.ndarray | None:
        """How long before the newest item of each target's history its items were; None: nobody reads times.

        Shape: (B, targets, first + targets - 1) float64, NaN for items that are not there.
        """
        if self.times is None:
            return None
        first = int(self.first[index[0]])
        inside, at = self._at(index, first + targets - 1)
        times = np.where(inside, self.times[at], np.nan)
        seconds: np.ndarray = times[:, first - 1 :, None] - times[:, None, :]
        return seconds

    def _at(self, index: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the first `width` items of windows are there, and where in the sequence. Shapes: (B, width)."""
        at = np.arange(width)
        inside = at < (self.first[index] + self.counts[index])[:, None]
        return inside, np.where(inside, self.start[index][:, None] + at, 0)


Rows = Examples | Windows


def all_prefixes(train: Sequence[np.ndarray], max_items: int, times: Sequence[np.ndarray] | None = None) -> Examples:
    """The usual augmentation [paper]: every event but a user's first is a target, with the `max_items` before it.

    times: of each sequence's events.
    """
    sequence, lengths, offsets = _flat(train)
    position = np.arange(len(sequence))
    first = np.repeat(offsets, lengths)
    target = position[position > first]
    start = np.maximum(first[target], target - max_items)
    return Examples(sequence, start, target, None if times is None else np.concatenate(times))


def all_windows(train: Sequence[np.ndarray], max_items: int, times: Sequence[np.ndarray] | None = None) -> Windows:
    """The same targets, packed. Long sequences are cut from the end, in steps of half of `max_items` targets."""
    sequence, lengths, offsets = _flat(train)
    step = max(1, max_items // 2)
    rows = []
    for begin, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        left = length - 1  # targets
        while left > max_items:
            rows.append((begin + left - max_items, max_items - step + 1, step))
            left -= step
        if left > 0:
            rows.append((begin, 1, left))
    start, first, counts = np.array(rows, dtype=np.int64).T
    return Windows(sequence, start, first, counts, None if times is None else np.concatenate(times))


def newest_targets(
    sequences: Sequence[np.ndarray], max_items: int, times: Sequence[np.ndarray] | None = None
) -> Examples:
    """The last event of each sequence as the target, with the `max_items` before it. All have two events at least."""
    sequence, lengths, offsets = _flat(sequences)
    target = offsets + lengths - 1
    start = np.maximum(offsets, target - max_items)
    return Examples(sequence, start, target, None if times is None else np.concatenate(times))


def as_windows(examples: Examples) -> Windows:
    """A row per example."""
    return Windows(examples.sequence, examples.start, examples.shapes, examples.counts, examples.times)


def _flat(train: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All events one after another, and each user's number of events and first event."""
    lengths = np.array([len(events) for events in train], dtype=np.int64)
    if not (lengths > 1).any():
        raise ValueError("No user has two training events; give more interactions than two per user.")
    return np.concatenate(train).astype(np.int32), lengths, lengths.cumsum() - lengths


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches (index arrays) in order: rows of like length together, the batches shuffled.

    batch_size: in targets; a batch of windows has a few more or less, because windows stay whole.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(rows))
    ordered = shuffled[np.argsort(rows.shapes[shuffled], kind="stable")]
    batches = np.split(ordered, _cuts(rows, batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


@lru_cache(maxsize=8)
def _cuts(rows: Rows, batch_size: int) -> np.ndarray:
    """Where new batches begin among the rows in order of their shapes; the same in every epoch."""
    order = np.argsort(rows.shapes, kind="stable")
    first, counts = rows.first[order], rows.counts[order]
    numbers = []  # of the batch of each row, per value of `first`
    for value in np.unique(first):
        group = counts[first == value]
        numbers.append((group.cumsum() - group) // batch_size)
    begins = [np.diff(number, prepend=-1) > 0 for number in numbers]
    return np.flatnonzero(np.concatenate(begins))[1:]


def steps_per_epoch(rows: Rows, batch_size: int) -> int:
    return len(_cuts(rows, batch_size)) + 1


def batch_at(rows: Rows, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The batch of a step, as if the epochs were laid end to end."""
    epoch, number = divmod(step, steps_per_epoch(rows, batch_size))
    return _epoch(rows, batch_size, seed, epoch)[number]


@lru_cache(maxsize=1)
def _epoch(rows: Rows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The newest epoch's batches: sorting them again at every step would cost more than the step."""
    return epoch_batches(rows, batch_size, seed, epoch)
