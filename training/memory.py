"""Chooses a bundle's item memory on validation: what was counted, what a linear model learnt, or both in one graph.

    w(i, j) = (1 - linear_share) * counted(i, j) + linear_share * linear(i, j)

`training/neighbours.py` makes the first, `training/linear.py` the second; each is divided by the mean of its rows' sums
of positive weights, so that at a share of a half both say as much. Whatever it was made of, it is one graph with one
recency: serving looks up the rows of a history once.

Whatever validation chooses here is judged on other users than those it was chosen with: `folds` holds, for each part of
the validation users, the memory that the rest would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from serving.items.neighbours import Neighbours
from serving.types import EventData
from training.config import MemoryParts, RunConfig
from training.data.prepare import Items, Split, sample_events, sample_users
from training.linear import LINEAR_GRID, LinearSetting, Moments, largest, linear_weights, predict
from training.neighbours import (
    GRID,
    JOINED_GRID,
    JoinedSetting,
    Log,
    coordinate_search,
    event_counts,
    history_weights,
    ndcg_of,
    nearest,
    seen_items,
    similarity_embedding,
    target_ndcg,
)

FOLDS = 2
TUNED_ITEMS = 6000  # the linear model's numbers are chosen on so many of the most frequent items, at most
# Beyond so many items, settings are compared on the rows of the sampled users' items, and the graph is made in blocks.
WHOLE_ITEMS = 100_000
BLOCK_ITEMS = 100_000
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class MemorySetting:
    """recency: of the history when the memory is looked up. linear_share: 0 counts alone, 1 the linear model alone."""

    counted: JoinedSetting
    linear: LinearSetting
    linear_share: float
    recency: float


@dataclass(frozen=True, slots=True)
class FittedMemory:
    """whole: chosen on all validation users, for the bundle. folds: positions among the sampled validation users, and
    the memory to judge them with, which was chosen on all others. report: for the bundle's `about`."""

    whole: Neighbours
    folds: tuple[tuple[np.ndarray, Neighbours], ...]
    report: dict[str, Any]


def fit_memory(items: Items, split: Split, config: RunConfig, cache: Path | None = None) -> FittedMemory:
    """The memory of the training part, chosen by validation NDCG@10, ranked as `evaluation.exclude_seen` says.

    cache: the folder of text embeddings, as in `training.ids.embed`. Takes a minute or two of one core for 4,000 items.
    Of more than WHOLE_ITEMS items, settings are compared on the rows that the sampled users' histories need.
    """
    parts = config.neighbours.parts
    return fit_memories(items, split, config, cache, (parts,))[parts]


def fit_memories(
    items: Items, split: Split, config: RunConfig, cache: Path | None, kinds: Sequence[MemoryParts]
) -> dict[MemoryParts, FittedMemory]:
    """Several kinds of memory, in less time than one by one: they share what they try. See `fit_memory`."""
    choice = _Choice(items, split, config, cache, needs_counts=set(kinds) != {"linear"})
    return {kind: _fit(choice, kind) for kind in kinds}


def _fit(choice: _Choice, kind: MemoryParts) -> FittedMemory:
    started = time.perf_counter()
    users = np.arange(len(choice.target))
    parts = [users[first::FOLDS] for first in range(min(FOLDS, len(users)))]
    own = [choice.setting(kind, np.setdiff1d(users, part) if len(parts) > 1 else users) for part in parts]
    setting = choice.setting(kind, users)
    cross_fitted = np.empty(len(users))
    for part, chosen in zip(parts, own, strict=True):
        cross_fitted[part] = choice.memory_ndcg(chosen)[part]
    whole = choice.memory(setting)
    report = {
        "setting": asdict(setting),
        "valid_ndcg@10": round(float(choice.memory_ndcg(setting).mean()), 5),
        "valid_ndcg@10_cross_fitted": round(float(cross_fitted.mean()), 5),
        "entries": len(whole.items),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return FittedMemory(
        whole, tuple((part, choice.memory(chosen)) for part, chosen in zip(parts, own, strict=True)), report
    )


class _Choice:
    """NDCG@10 of every validation user under any setting, remembered, so that folds share what they try."""

    def __init__(
        self, items: Items, split: Split, config: RunConfig, cache: Path | None, *, needs_counts: bool
    ) -> None:
        self.keep, self.max_items, self.train = config.neighbours.keep, config.model.max_items, split.train
        sampled = config.evaluation.choice_users
        users, self.target = sample_users(split.valid_history, split.valid_target, sampled)
        self.weights, train_weights = _weights(sample_events(split.valid_events, sampled)), _weights(split.train_events)
        self.histories = [history[-self.max_items :] for history in users]
        self.seen = seen_items(users, len(items)) if config.evaluation.exclude_seen else None
        self.rows = None if len(items) <= WHOLE_ITEMS else np.unique(np.concatenate(self.histories))  # None: all
        if needs_counts:  # a linear model needs no embedding, which takes minutes
            embedding = similarity_embedding(items, split.train, config, cache)
            self.log_of = partial(Log.of, split.train, embedding, nearest(embedding, self.keep), weights=train_weights)
            self.log = self.log_of(self.rows)
        self.counts = event_counts(split.train, len(items), train_weights)
        tie_break = np.random.default_rng(0).permutation(len(items))  # a catalogue's order may reveal the future
        self.frequent = np.sort(np.lexsort((tie_break, -self.counts))[:TUNED_ITEMS])
        self._ndcg: dict[Any, np.ndarray] = {}
        self._memories: dict[MemorySetting, Neighbours] = {}
        self._counted = lru_cache(maxsize=2)(self._counted_weights)
        self._linear = lru_cache(maxsize=FOLDS + 1)(self._linear_weights)
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
        if kind != "both":
            return only_linear if kind == "linear" else only_counted
        start = max((only_counted, only_linear), key=mean(self.memory_ndcg))
        grid = {"linear_share": SHARES, "recency": (linear.recency, counted.recency, *GRID["recency"])}
        return coordinate_search(start, grid, mean(self.memory_ndcg), desc="memory, blend")[0]

    def memory(self, setting: MemorySetting) -> Neighbours:
        """The graph itself, its rows cut to `keep` weights."""
        if setting not in self._memories:
            every = np.arange(len(self.counts))
            blocks = [None] if self.rows is None else np.array_split(every, -(-len(every) // BLOCK_ITEMS))
            kept = sparse.vstack([largest(self._weights(setting, rows), self.keep) for rows in blocks], format="csr")
            self._memories[setting] = Neighbours(
                kept.indptr.astype(np.int64), kept.indices.astype(np.int32), kept.data.astype(np.float32),
                setting.recency,
            )  # fmt: skip
        return self._memories[setting]

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

    def _weights(self, setting: MemorySetting, rows: np.ndarray | None = None) -> sparse.csr_matrix:
        """w before rows are cut: some rows of it, or (None) the matrix as far as settings are compared on it."""
        share, parts = setting.linear_share, []
        if share < 1:
            counted = self._counted(_only(setting.counted))
            part = counted if rows is None else self.log_of(rows).weights(setting.counted)[rows]
            parts.append((1 - share) * self._unit(counted) * part)
        if share > 0:
            linear = self._linear(setting.linear)
            parts.append(share * self._unit(linear) * (linear if rows is None else linear[rows]))
        return sum(parts[1:], start=parts[0]).tocsr()

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


def _only(setting: JoinedSetting) -> JoinedSetting:
    """Without the recency, which the weights do not depend on: one entry in the cache instead of several."""
    return replace(setting, recency=0.0)
