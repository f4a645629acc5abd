"""Settings of an item memory, compared by NDCG@10 on a sample of the validation users (`training/memory.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from serving.items.neighbours import Neighbours
from serving.types import EventData
from training.config import MemoryParts, RunConfig
from training.data.prepare import Split, sample_events, sample_users
from training.data.read import Items
from training.linear import LINEAR_GRID, LinearSetting, Moments, largest, linear_weights, predict
from training.memory_scores import coordinate_search, history_weights, ndcg_of, seen_items, target_ndcg
from training.neighbours import (
    GRID,
    JOINED_GRID,
    CountedLog,
    JoinedSetting,
    event_counts,
    nearest,
    similarity_embedding,
)

TUNED_ITEMS = 6000  # the linear model's numbers are chosen on so many of the most frequent items, at most
# Beyond so many items, settings are compared on the rows of the sampled users' items, and the graph is made in blocks.
WHOLE_ITEMS = 50_000
BLOCK_ITEMS = 100_000
FITS = 3  # remembered: one for each half of the users, and one for all
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class MemorySetting:
    """recency: of the history when the memory is looked up. linear_share: 0 counts alone, 1 the linear model alone.

    earlier_share: 0 what was fitted now alone, 1 the earlier memory alone.
    """

    counted: JoinedSetting
    linear: LinearSetting
    linear_share: float
    recency: float
    earlier_share: float = 0.0


class MemoryChoice:
    """What the sampled validation users say of any setting, remembered, so that folds share what they try.

    target: (U,) their targets. held_out: how many users they were drawn from.
    """

    def __init__(
        self,
        items: Items,
        split: Split,
        config: RunConfig,
        cache: Path | None,
        earlier: Neighbours | None,
        behaviour: np.ndarray | None = None,
        *,
        needs_counts: bool,
    ) -> None:
        self.keep, self.max_items, self.train = config.neighbours.keep, config.model.max_items, split.train
        sampled = config.evaluation.choice_users
        users, self.target = sample_users(split.valid_history, split.valid_target, sampled)
        self.held_out = len(split.valid_target)
        self.weights, train_weights = _weights(sample_events(split.valid_events, sampled)), _weights(split.train_events)
        self.histories = [history[-self.max_items :] for history in users]
        self.seen = seen_items(users, len(items)) if config.evaluation.exclude_seen else None
        self.rows = None if len(items) <= WHOLE_ITEMS else np.unique(np.concatenate(self.histories))  # None: all
        if needs_counts:  # a linear model needs no embedding, which takes minutes
            embedding = similarity_embedding(items, split.train, config, cache, behaviour)
            self.log_of = partial(
                CountedLog.of, split.train, embedding, nearest(embedding, self.keep), weights=train_weights
            )
            self.log = self.log_of(self.rows)
        self.earlier = None if earlier is None else _as_matrix(earlier, len(items))
        self.counts = event_counts(split.train, len(items), train_weights)
        tie_break = np.random.default_rng(0).permutation(len(items))  # a catalogue's order may reveal the future
        self.frequent = np.sort(np.lexsort((tie_break, -self.counts))[:TUNED_ITEMS])
        self._ndcg: dict[Any, np.ndarray] = {}
        self._memories: dict[MemorySetting, Neighbours] = {}
        self._counted = lru_cache(maxsize=FITS)(self._counted_weights)
        self._linear = lru_cache(maxsize=FITS)(self._linear_weights)
        self._moments = lru_cache(maxsize=1)(
            lambda recency: Moments.of(self.train, len(self.counts), self.max_items, recency, train_weights)
        )
        self._predicted = lru_cache(maxsize=1)(self._predict)

    def setting(self, kind: MemoryParts, users: np.ndarray) -> MemorySetting:
        """What some validation users choose for a kind of memory. users: positions among the sampled ones."""

        def mean(ndcg: Callable[[Any], np.ndarray]) -> Callable[[Any], float]:
            return lambda setting: float(ndcg(setting)[users].mean())

        counted, linear = JoinedSetting(), LinearSetting()
        if kind != "linear":
            counted, _ = coordinate_search(counted, JOINED_GRID, mean(self.counted_ndcg), desc="memory, counted")
        if kind != "counted":
            linear, _ = coordinate_search(linear, LINEAR_GRID, mean(self.linear_ndcg), desc="memory, linear")
        only_counted = MemorySetting(counted, linear, 0.0, counted.recency)
        only_linear = MemorySetting(counted, linear, 1.0, linear.recency)
        chosen = only_linear if kind == "linear" else only_counted
        if kind == "both":
            start = max((only_counted, only_linear), key=mean(self.memory_ndcg))
            grid = {"linear_share": SHARES, "recency": (linear.recency, counted.recency, *GRID["recency"])}
            chosen, _ = coordinate_search(start, grid, mean(self.memory_ndcg), desc="memory, blend")
        if self.earlier is not None:
            grid = {"earlier_share": SHARES, "recency": GRID["recency"]}
            chosen, _ = coordinate_search(chosen, grid, mean(self.memory_ndcg), desc="memory, with the earlier one")
        return chosen

    def memories(self, settings: Sequence[MemorySetting]) -> list[Neighbours]:
        """The graphs themselves, their rows cut to `keep` weights. All are made block by block together, because what
        takes longest, the similarity of a block's items, is the same in all."""
        made: dict[MemorySetting, list[sparse.csr_matrix]] = {s: [] for s in settings if s not in self._memories}
        every, counts = np.arange(len(self.counts)), any(setting.linear_share < 1 for setting in made)
        blocks = [None] if self.rows is None else np.array_split(every, -(-len(every) // BLOCK_ITEMS))
        for rows in tqdm(blocks, desc="memory, graph", unit="block", mininterval=1.0, disable=len(blocks) == 1):
            log = self.log_of(rows) if rows is not None and counts else None
            for setting, parts in made.items():
                parts.append(largest(self._weights(setting, rows, log), self.keep).astype(np.float32))
        for setting, parts in made.items():
            kept = sparse.vstack(parts, format="csr")
            parts.clear()
            offsets, items = kept.indptr.astype(np.int64), kept.indices.astype(np.int32, copy=False)
            self._memories[setting] = Neighbours(offsets, items, kept.data, setting.recency)
        return [self._memories[setting] for setting in settings]

    def counted_ndcg(self, setting: JoinedSetting) -> np.ndarray:
        """Shape: (U,)."""
        return self._remembered(setting, lambda: self._ndcg_of(self._counted(_only(setting)), setting.recency))

    def linear_ndcg(self, setting: LinearSetting) -> np.ndarray:
        """Of the frequent items, by the exact weights; a target that is not among them is missed. Shape: (U,)."""

        def ndcg() -> np.ndarray:
            scores = self._predicted(setting.recency, setting.ridge) * self._scale(setting)[self.frequent]
            if self.seen is not None:
                scores[self.seen[:, self.frequent].nonzero()] = -np.inf
            column = np.searchsorted(self.frequent, self.target).clip(max=len(self.frequent) - 1)
            return np.where(self.frequent[column] == self.target, target_ndcg(scores, column), 0.0)

        return self._remembered(setting, ndcg)

    def memory_ndcg(self, setting: MemorySetting) -> np.ndarray:
        """Shape: (U,)."""
        return self._remembered(setting, lambda: self._ndcg_of(self._weights(setting), setting.recency))

    def _remembered(self, setting: Any, ndcg: Callable[[], np.ndarray]) -> np.ndarray:
        if setting not in self._ndcg:
            self._ndcg[setting] = ndcg()
        return self._ndcg[setting]

    def _ndcg_of(self, weights: sparse.csr_matrix, recency: float) -> np.ndarray:
        return ndcg_of(self._history(recency), weights, self.target, self.seen)

    def _history(self, recency: float) -> sparse.csr_matrix:
        weights = self.weights and [own[-self.max_items :] for own in self.weights]
        return history_weights(self.histories, len(self.counts), recency, weights)

    def _weights(
        self, setting: MemorySetting, rows: np.ndarray | None = None, log: CountedLog | None = None
    ) -> sparse.csr_matrix:
        """w before rows are cut: some rows of it, with their log, or (None) as far as settings are compared on it."""
        share, parts = setting.linear_share, []
        if share < 1:
            counted = self._counted(_only(setting.counted))
            part = counted if log is None else log.weights(setting.counted)[rows]
            parts.append((1 - share) * self._unit(counted) * part)
        if share > 0:
            linear = self._linear(setting.linear)
            parts.append(share * self._unit(linear) * (linear if rows is None else linear[rows]))
        fitted = sum(parts[1:], start=parts[0])
        if self.earlier is not None and (kept := setting.earlier_share):
            earlier = self.earlier if rows is None else self.earlier[rows]
            fitted = (1 - kept) * fitted + kept * self._unit(self.earlier) * earlier
        return fitted.tocsr()

    def _unit(self, weights: sparse.csr_matrix) -> float:
        """What brings the mean of the sums of a row's positive weights to 1, over the rows that are compared."""
        compared = weights if self.rows is None else weights[self.rows]
        total = compared.data.clip(min=0).sum()
        return float(compared.shape[0] / total) if total else 1.0

    def _counted_weights(self, setting: JoinedSetting) -> sparse.csr_matrix:
        return self.log.weights(setting)

    def _linear_weights(self, setting: LinearSetting) -> sparse.csr_matrix:
        return linear_weights(self._moments(setting.recency), setting.ridge, self._scale(setting), self.keep)

    def _predict(self, recency: float, ridge: float) -> np.ndarray:
        history = self._history(recency)[:, self.frequent]
        return predict(self._moments(recency).among(self.frequent), ridge, history)

    def _scale(self, setting: LinearSetting) -> np.ndarray:
        scale: np.ndarray = np.maximum(self.counts, 1) ** np.float32(-setting.target)
        return scale


def _weights(events: Sequence[EventData] | None) -> list[np.ndarray] | None:
    return None if events is None else [each.weights for each in events]


def _as_matrix(neighbours: Neighbours, items: int) -> sparse.csr_matrix:
    """w with rows and columns for so many items. Shape: (I, I) float32."""
    entries = neighbours.weights, neighbours.items, neighbours.offsets
    matrix = sparse.csr_matrix(entries, shape=(len(neighbours), items))
    matrix.resize(items, items)
    return matrix


def _only(setting: JoinedSetting) -> JoinedSetting:
    """Without the recency, which the weights do not depend on: one entry in the cache instead of several."""
    return replace(setting, recency=0.0)
