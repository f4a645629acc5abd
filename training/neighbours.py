"""The counted part of the item graph: what followed an item in other histories, and which texts resemble its own.

    w(i, j) = co(i, j) / (n_i ** source * n_j ** target)
              + similar_weight * exp((cos(e_i, e_j) - 1) / similar_temperature)   for j != i
    co(i, j) = sum over pairs of one training sequence, i then j, d <= window steps apart, of a * b * d ** -distance,
               plus backward * the same for j then i

a and b are the weights of the two events, 1 unless their types have others, and n sums those of an item's training
events; e embeds an item's text, or the items it occurs with if the data have no text. Validation chooses every number
(`training/memory.py`). [open: none of this is in the paper.]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from training.config import RunConfig
from training.data.read import Items
from training.ids.embed import collaborative_embedding, embed_text, item_text
from training.similar import similar_items

CHUNK = 1024


@dataclass(frozen=True, slots=True)
class CountingSettings:
    """How co-occurrence is counted, and how fast the weight of older items in the history falls."""

    window: int = 20
    distance: float = 0.5
    backward: float = 0.5
    recency: float = 1.0
    source: float = 0.5
    target: float = 0.25


@dataclass(frozen=True, slots=True)
class JoinedSetting(CountingSettings):
    """The same, and how much similar texts count."""

    similar_weight: float = 1.0
    similar_temperature: float = 0.3


GRID: dict[str, tuple[Any, ...]] = {
    "recency": (0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
    "distance": (0.0, 0.25, 0.5, 1.0, 1.5),
    "backward": (0.0, 0.25, 0.5, 0.75, 1.0),
    "target": (0.0, 0.15, 0.3, 0.5),
    "source": (0.0, 0.25, 0.5, 0.75, 1.0),
    "window": (1, 3, 5, 10, 20),
}
JOINED_GRID = GRID | {
    "similar_weight": (0.0, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0),
    "similar_temperature": (0.05, 0.1, 0.2, 0.3, 0.5),
}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Ordered pairs of one sequence: (P,) item rows, the earlier and the later one, and their distance in steps.

    weight: (P,) float32, the product of both events'; None: all count alike.
    """

    earlier: np.ndarray
    later: np.ndarray
    steps: np.ndarray
    weight: np.ndarray | None = None


def similarity_embedding(
    items: Items,
    train_sequences: Sequence[np.ndarray],
    config: RunConfig,
    cache: Path | None,
    behaviour: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of unit length; zero where nothing is known of an item. behaviour: as in `fit_memory`.

    Shape: (I, E) float32.
    """
    if not items.has_text:
        made, dim = behaviour, config.tokenizer.collaborative_dim
        if made is None:
            made = collaborative_embedding(train_sequences, len(items), dim, config.seed)
        return np.where(np.linalg.norm(made, axis=1, keepdims=True) > 0.5, made, 0)  # shorter ones were drawn at random
    texts = item_text(items)
    made = embed_text(texts, config.tokenizer.embedder, cache)
    return np.where([[bool(text)] for text in texts], made, np.float32(0))


@dataclass(frozen=True, slots=True)
class CountedLog:
    """What w is computed from, for any setting: of all items, or of some rows, and then the other rows are incomplete.

    counts: (I,) training events. cosine: (I, I), sparse.
    """

    pairs: Pairs
    counts: np.ndarray
    cosine: sparse.csr_matrix
    counted: dict[tuple[int, float], sparse.csr_matrix] = field(default_factory=dict)  # the last pairs counted

    @staticmethod
    def of(
        sequences: Sequence[np.ndarray],
        embedding: np.ndarray,
        similar: tuple[np.ndarray, np.ndarray],
        rows: np.ndarray | None = None,
        weights: Sequence[np.ndarray] | None = None,
    ) -> CountedLog:
        """similar: each item's most similar items, as by `nearest`. rows: catalogue rows; None: all. weights: of each
        sequence's events.

        cosine holds these and all that occur with an item: if there are as many as a row keeps, others are never kept.
        """
        wanted = np.full(len(embedding), rows is None)
        if rows is not None:
            wanted[rows] = True
        pairs = pairs_within(sequences, max(GRID["window"]), None if rows is None else wanted, weights)
        kept = wanted[similar[0]]
        row = np.concatenate([similar[0][kept], pairs.earlier, pairs.later])
        col = np.concatenate([similar[1][kept], pairs.later, pairs.earlier])
        row, col = row[wanted[row]], col[wanted[row]]
        known = np.linalg.norm(embedding, axis=1) > 0
        kept = (row != col) & known[row] & known[col]
        shape = (len(embedding), len(embedding))
        both = sparse.csr_matrix((np.ones(kept.sum(), bool), (row[kept], col[kept])), shape=shape)  # each pair once
        row, col = np.repeat(np.arange(len(embedding)), np.diff(both.indptr)), both.indices
        values = np.concatenate([
            np.einsum("pe,pe->p", embedding[row[at : at + CHUNK * 64]], embedding[col[at : at + CHUNK * 64]])
            for at in range(0, len(row), CHUNK * 64)
        ] or [np.empty(0, np.float32)])  # fmt: skip
        counts = event_counts(sequences, len(embedding), weights)
        return CountedLog(pairs, counts, sparse.csr_matrix((values, col, both.indptr), shape=shape))

    def weights(self, setting: JoinedSetting) -> sparse.csr_matrix:
        """w, before rows are truncated. Shape: (I, I) float64."""
        similar = self.cosine.astype(np.float64)
        similar.data = setting.similar_weight * np.exp((similar.data - 1) / setting.similar_temperature)
        key = (setting.window, setting.distance)
        if key not in self.counted:  # most settings that a search tries share these two
            self.counted.clear()
            self.counted[key] = forward_pairs(self.pairs, len(self.counts), *key)
        return (scaled_pairs(self.counted[key], self.counts, setting) + similar).tocsr()


def event_counts(
    sequences: Sequence[np.ndarray], items: int, weights: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Training events per item, or the sum of their weights. Shape: (I,) float32."""
    each = None if weights is None else np.concatenate(list(weights))
    return np.bincount(np.concatenate(list(sequences)), each, minlength=items).astype(np.float32)


def pairs_within(
    sequences: Sequence[np.ndarray],
    window: int,
    wanted: np.ndarray | None = None,
    weights: Sequence[np.ndarray] | None = None,
) -> Pairs:
    """All pairs at most `window` steps apart. wanted: (I,) bool; only pairs with one of these items, None: all."""
    flat = np.concatenate(list(sequences))
    each = None if weights is None else np.concatenate(list(weights))
    lengths = [len(sequence) for sequence in sequences]
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(1, len(flat) + 1)  # events after each in its sequence
    of_wanted = None if wanted is None else wanted[flat]
    begin = np.arange(len(flat))
    earlier, later, steps, weight = [], [], [], []
    for d in range(1, window + 1):
        begin = begin[left[begin] >= d]  # fewer and fewer
        kept = begin if of_wanted is None else begin[of_wanted[begin] | of_wanted[begin + d]]
        earlier.append(flat[kept])
        later.append(flat[kept + d])
        steps.append(np.full(len(kept), d, np.int16))
        if each is not None:
            weight.append(each[kept] * each[kept + d])
    return Pairs(
        np.concatenate(earlier),
        np.concatenate(later),
        np.concatenate(steps),
        np.concatenate(weight) if weight else None,
    )


def forward_pairs(pairs: Pairs, items: int, window: int, distance: float) -> sparse.csr_matrix:
    """The part of co(i, j) that counts j after i. Shape: (I, I) float64."""
    near = pairs.steps <= window
    weight = pairs.steps[near].astype(np.float64) ** -distance
    if pairs.weight is not None:
        weight *= pairs.weight[near]
    return sparse.csr_matrix((weight, (pairs.earlier[near], pairs.later[near])), shape=(items, items))


def scaled_pairs(forward: sparse.csr_matrix, counts: np.ndarray, setting: CountingSettings) -> sparse.csr_matrix:
    """co(i, j), with what precedes, divided by the powers of n_i and n_j. Shape: (I, I) float64."""
    events = np.maximum(counts, 1.0)
    scaled = (
        sparse.diags(events**-setting.source)
        @ (forward + setting.backward * forward.T)
        @ sparse.diags(events**-setting.target)
    )
    return scaled.tocsr()


def nearest(embedding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` most similar other items of every item, where both are known. Shapes: (I, E) -> (P,), (P,) rows.

    An index may miss some, see `similar_items`.
    """
    known = np.flatnonzero(np.linalg.norm(embedding, axis=1) > 0).astype(np.int32)
    if len(known) < 2:  # nothing to resemble
        return known[:0], known[:0]
    found = similar_items(torch.from_numpy(embedding[known]), count).numpy()
    is_item = found >= 0
    return np.repeat(known, is_item.sum(1)), known[found[is_item]]
