"""What walks begin with, computed once from a trained network and its item memory, and kept under a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.accuracy.full_ranking import HISTORY_ITEMS
from benchmarks.accuracy.pointer_walk import SLOTS, Begin, Slots, best_slots
from benchmarks.accuracy.ranks import evaluation_users
from benchmarks.accuracy.views import Lists, find_lists
from serving.files import atomic_write
from serving.items.neighbours import Neighbours
from serving.search.beam import reason, search_settings
from training.data.read import Dataset
from training.memory import FittedMemory, fit_memories
from training.workspace import Workspace

BATCH = 256
Arrays = dict[str, np.ndarray]
Read = Callable[[Begin], list[torch.Tensor]]  # what each form of a model gives every item. Shape of each: (B, I)
Folds = Sequence[tuple[np.ndarray, Neighbours]]  # positions of users, and the memory that is asked for them


@dataclass(frozen=True, slots=True)
class Walkers:
    """U users. state: (U, D) float32. slots: (U, R). target: (U,) int64. histories: of each, barred where `excluded`.
    support: (U,) float64, log of what the memory knows of a history, -inf for nothing."""

    state: torch.Tensor
    slots: Slots
    target: torch.Tensor
    histories: Sequence[np.ndarray]
    excluded: bool
    support: np.ndarray

    @property
    def log_length(self) -> np.ndarray:
        """As among the features of `serving.types.Gate`. Shape: (U,)."""
        return np.log([min(len(history), HISTORY_ITEMS) for history in self.histories])

    def every(self, count: int) -> Walkers:
        """The first of every so many."""
        return self.of(np.arange(0, len(self.target), count))

    def of(self, index: np.ndarray) -> Walkers:
        slots = Slots(self.slots.items[index], self.slots.log_weight[index])
        histories = [self.histories[user] for user in index]
        return Walkers(self.state[index], slots, self.target[index], histories, self.excluded, self.support[index])

    def begin(self, index: np.ndarray, items: int) -> Begin:
        rested = _marked([self.histories[i] for i in index], items)
        barred = rested if self.excluded else torch.zeros_like(rested)
        slots = Slots(self.slots.items[index], self.slots.log_weight[index])
        return Begin(self.state[index], slots, rested, barred)

    def batches(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.target), BATCH):
            yield np.arange(first, min(first + BATCH, len(self.target)))


@dataclass(frozen=True)
class Inputs:
    """Of one rule. work: with the trained network. data: what it was trained on. cache: of the items' embedded texts.
    folder: keeps what takes a while."""

    work: Workspace
    data: Dataset
    cache: Path
    folder: Path
    excluded: bool

    @cached_property
    def memory(self) -> FittedMemory:
        """The counted memory, chosen by the rule that it is measured by."""
        config = self.work.config
        by_rule = config.evaluation.model_copy(update={"exclude_seen": self.excluded})
        config = config.model_copy(update={"evaluation": by_rule})
        return fit_memories(self.data.items, self.work.split, config, self.cache, ("counted",))["counted"]

    @property
    def vectors(self) -> torch.Tensor:
        return self.work.network.item_vectors(self.work.item_tokens).detach()

    def users(self, part: str) -> Walkers:
        """Those of "test" or "valid". What each of the latter begins with is the memory that others chose."""
        histories, target = evaluation_users(self.work, part)
        folds = self.memory.folds if part == "valid" else ((np.arange(len(target)), self.memory.whole),)
        return self._walkers(part, histories, target, folds)

    @cached_property
    def held_out(self) -> Walkers:
        """The validation users that choose nothing, to train on: neither network nor memory has learnt their targets.

        Of a training prefix both have: the state there knows what comes next.
        """
        split = self.work.split
        order = np.random.default_rng(0).permutation(len(split.valid_target))  # as in `sample_users`
        users = order[self.work.config.evaluation.choice_users :]
        histories = [split.valid_history[user] for user in users]
        folds = ((np.arange(len(users)), self.memory.whole),)
        return self._walkers("held-out", histories, split.valid_target[users], folds)

    def lists(self, part: str, beam: int) -> Lists:
        """What the network alone answers by its beam."""
        name = f"lists-{part}-beam-{beam}-excluded-{self.excluded}"
        histories = evaluation_users(self.work, part)[0]

        def search() -> Arrays:
            found = find_lists(replace(self.work, neighbours=None), histories, beam, self.excluded)
            return {"items": found.items, "log_p": found.log_p}

        return Lists(**self._kept(name, search))

    def states(self, part: str, histories: Sequence[np.ndarray], items: int | None = None) -> torch.Tensor:
        """s_0 of the network as trained, or reading so many of the newest items. Shape: (U, D)."""
        name = f"states-{part}" + (f"-of-{items}-items" if items else "")
        return torch.from_numpy(self._kept(name, lambda: {"state": self._compute_states(histories, items)})["state"])

    def _walkers(self, part: str, histories: Sequence[np.ndarray], target: np.ndarray, folds: Folds) -> Walkers:
        width = min(SLOTS, len(self.work.item_tokens))
        items, support = np.empty((len(target), width), np.int64), np.empty(len(target))
        log_weight = np.empty(items.shape, np.float32)
        for users, memory in folds:
            for rows in np.array_split(users, -(-len(users) // BATCH)):
                of_batch = [histories[row] for row in rows]
                shares, features = memory.shares(of_batch, HISTORY_ITEMS)
                slots = self._slots(shares.dense(len(memory)), of_batch)
                items[rows], log_weight[rows], support[rows] = *slots, features["support"]
        slots = Slots(torch.from_numpy(items), torch.from_numpy(log_weight))
        wanted = torch.from_numpy(target.astype(np.int64))
        return Walkers(self.states(part, histories), slots, wanted, histories, self.excluded, support)

    def _slots(self, shares: np.ndarray, histories: Sequence[np.ndarray]) -> Slots:
        permitted = torch.from_numpy(shares)
        if self.excluded:
            permitted = permitted.masked_fill(_marked(histories, shares.shape[1]), 0)
        return best_slots(permitted)

    @torch.inference_mode()
    def _compute_states(self, histories: Sequence[np.ndarray], items: int | None) -> np.ndarray:
        ranker = replace(self.work.ranker(), neighbours=None)
        if items:
            ranker = replace(ranker, settings=replace(ranker.settings, max_items=items))
        found = np.empty((len(histories), self.work.config.model.d_model), np.float32)
        settings = search_settings(self.work.vocabulary, self.work.settings)
        for index in ranker.batches(histories):
            cross = ranker.encode([histories[i] for i in index]).cross
            found[index] = reason(ranker.runtime, settings, cross, 0).states[:, 0, 0].numpy()
        return found

    def _kept(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        file = self.folder / f"{name}.npz"
        if not file.exists():
            with atomic_write(file) as partial, partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **compute())
        with np.load(file) as stored:
            return dict(stored)


def _marked(rows: Sequence[np.ndarray], items: int) -> torch.Tensor:
    """Which items each of several lists of rows holds. Shape: (B, I) bool."""
    marked = torch.zeros(len(rows), items, dtype=torch.bool)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    marked[torch.from_numpy(owner), torch.from_numpy(np.concatenate(list(rows)).astype(np.int64))] = True
    return marked
