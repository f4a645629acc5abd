"""Training sequences as examples: every prefix of a user's sequence with its next item, batched by length.

Batches of one length need almost no padding, which is most of what makes training affordable on a CPU. Everything
random follows from (seed, epoch), so that a resumed run sees the batches of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Examples:
    """All (history, next item) pairs. An example is a window of one flat array.

    sequence: (events,) int32 item rows of all users. start, target: (E,) int64, the history is sequence[start:target],
    the item to predict sequence[target].
    """

    sequence: np.ndarray
    start: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    def histories(self, index: np.ndarray) -> list[np.ndarray]:
        return [self.sequence[self.start[i] : self.target[i]] for i in index]

    def targets(self, index: np.ndarray) -> np.ndarray:
        """Shape: (B,) int64."""
        items: np.ndarray = self.sequence[self.target[index]]
        return items.astype(np.int64)


def all_prefixes(train: Sequence[np.ndarray], max_items: int) -> Examples:
    """The usual augmentation [paper]: every event but a user's first is a target, with the `max_items` before it."""
    lengths = np.array([len(events) for events in train], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sequence = np.concatenate([*train, np.empty(0, np.int32)]).astype(np.int32)
    position = np.arange(len(sequence))
    first = np.repeat(offsets[:-1], lengths)
    target = position[position > first]
    start = np.maximum(first[target], target - max_items)
    if len(target) == 0:
        raise ValueError("No user has two training events; give more interactions than two per user.")
    return Examples(sequence, start, target)


def epoch_batches(examples: Examples, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches (index arrays) in order: examples of like length together, the batches shuffled."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(examples))
    length = (examples.target - examples.start)[shuffled]
    by_length = shuffled[np.argsort(length, kind="stable")]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_at(examples: Examples, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The batch of a step, as if the epochs were laid end to end."""
    per_epoch = -(-len(examples) // batch_size)
    epoch, number = divmod(step, per_epoch)
    return _cached_epoch(examples, batch_size, seed, epoch)[number]


_EPOCH: dict[tuple[int, int, int, int], tuple[Examples, list[np.ndarray]]] = {}


def _cached_epoch(examples: Examples, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The newest epoch's batches: sorting them again at every step would cost more than the step."""
    key = (id(examples), batch_size, seed, epoch)
    if key not in _EPOCH:
        _EPOCH.clear()
        # the examples are kept with their batches: an id may be reused once its object is gone
        _EPOCH[key] = examples, epoch_batches(examples, batch_size, seed, epoch)
    return _EPOCH[key][1]
