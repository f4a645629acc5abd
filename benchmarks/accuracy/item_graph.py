"""What needs no network, once per data folder: tuned item-to-item neighbours, and the item memory of a bundle, whole
and each of its parts alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from benchmarks.accuracy import neighbours
from benchmarks.accuracy.full_ranking import HISTORY_ITEMS, Score, rank
from benchmarks.accuracy.variants import Setup
from training.config import MemoryParts
from training.data.prepare import Split, sample_users, split_by
from training.data.read import Dataset, read_data
from training.memory import FittedMemory, fit_memories
from training.metrics import recall_ndcg, target_ranks

TUNED, MEMORY = "tuned neighbours", "memory alone"
PARTS: dict[str, MemoryParts] = {"counted with texts": "counted", "linear model": "linear", MEMORY: "both"}
TUNING_USERS = 10_000  # validation users that tune the neighbours, at most: all of 57,000 would take an hour


@lru_cache(maxsize=1)
def data_of(setup: Setup) -> tuple[Dataset, Split]:
    data = read_data(setup.data)
    return data, split_by(data, setup.settings("plain", 0).split, times=True)


@lru_cache(maxsize=1)
def memories_of(setup: Setup) -> dict[MemoryParts, FittedMemory]:
    data, split = data_of(setup)
    return fit_memories(data.items, split, setup.settings("plain", 0), setup.work / "cache", tuple(PARTS.values()))


def memory_of(setup: Setup) -> FittedMemory:
    return memories_of(setup)["both"]


@lru_cache(maxsize=len(PARTS) + 1)
def ranks_of(setup: Setup, name: str) -> np.ndarray:
    """Where the test targets stand without a network, counted from 0; 10 for all beyond. Shape: (U,) int64."""
    data, split = data_of(setup)
    if name in PARTS:
        graph = memories_of(setup)[PARTS[name]].whole
        return _ranks(lambda histories: graph.shares(histories, HISTORY_ITEMS)[0].dense(len(graph)), split)

    histories, target = sample_users(split.valid_history, split.valid_target, TUNING_USERS)

    def validation_ndcg(candidate: neighbours.Neighbours) -> float:
        return recall_ndcg(rank(candidate.scores, histories, exclude_seen=False), target)["ndcg@10"]

    tuned, _ = neighbours.tune(split.train, len(data.items), validation_ndcg)
    return _ranks(tuned.scores, split)


def _ranks(score: Score, split: Split) -> np.ndarray:
    return target_ranks(rank(score, split.test_history, exclude_seen=False), split.test_target)
