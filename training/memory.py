"""Chooses a bundle's item memory on validation: what was counted, what a linear model learnt, or both in one graph.

    w(i, j) = (1 - linear_share) * counted(i, j) + linear_share * linear(i, j)

`training/neighbours.py` makes the first, `training/linear.py` the second; each is divided by the mean of its rows' sums
of positive weights, so that at a share of a half both say as much. Whatever it was made of, it is one graph with one
recency: serving looks up the rows of a history once. The next version of a bundle blends it, in the same way and with
an `earlier_share`, with the memory of the bundle that it goes on from, whose log it may not have.

Whatever validation chooses here is judged on other users than those it was chosen with: `folds` holds, for each part of
the validation users, the memory that the rest would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.items.neighbours import Neighbours
from training.config import MemoryParts, RunConfig
from training.data.prepare import Split
from training.data.read import Items
from training.memory_choice import MemoryChoice, MemorySetting

FOLDS = 2


@dataclass(frozen=True, slots=True)
class FittedMemory:
    """whole: chosen on all validation users, for the bundle. folds: positions among the sampled validation users, and
    the memory to judge them with, which was chosen on all others. report: for the bundle's `about`; `users` of all `of`
    validation users were drawn. setting: of `whole`."""

    whole: Neighbours
    folds: tuple[tuple[np.ndarray, Neighbours], ...]
    report: dict[str, Any]
    setting: MemorySetting


def fit_memory(
    items: Items,
    split: Split,
    config: RunConfig,
    cache: Path | None = None,
    earlier: Neighbours | None = None,
    behaviour: np.ndarray | None = None,
) -> FittedMemory:
    """The memory of the training part, chosen by validation NDCG@10, ranked as `evaluation.exclude_seen` says.

    cache: the folder of text embeddings, as in `training.ids.embed`. earlier: the memory of an earlier version, whose
    items are the first ones here. behaviour: what `collaborative_embedding` makes of the training histories, if there;
    read only where no item has text. Takes a minute or two of one core for 4,000 items. Of more than 50,000, settings
    are compared on the rows that the sampled users' histories need.
    """
    parts = config.neighbours.parts
    return fit_memories(items, split, config, cache, (parts,), earlier, behaviour)[parts]


def fit_memories(
    items: Items,
    split: Split,
    config: RunConfig,
    cache: Path | None,
    kinds: Sequence[MemoryParts],
    earlier: Neighbours | None = None,
    behaviour: np.ndarray | None = None,
) -> dict[MemoryParts, FittedMemory]:
    """Several kinds of memory, in less time than one by one: they share what they try. See `fit_memory`."""
    needs_counts = set(kinds) != {"linear"}
    choice = MemoryChoice(items, split, config, cache, earlier, behaviour, needs_counts=needs_counts)
    return {kind: _fit(choice, kind) for kind in kinds}


def make_memory(
    setting: MemorySetting,
    items: Items,
    split: Split,
    config: RunConfig,
    cache: Path | None = None,
    earlier: Neighbours | None = None,
    behaviour: np.ndarray | None = None,
) -> Neighbours:
    """The memory of a training part by a setting that was chosen before. The other arguments as in `fit_memory`."""
    choice = MemoryChoice(items, split, config, cache, earlier, behaviour, needs_counts=setting.linear_share < 1)
    return choice.memories([setting])[0]


def _fit(choice: MemoryChoice, kind: MemoryParts) -> FittedMemory:
    started = time.perf_counter()
    users = np.arange(len(choice.target))
    parts = [users[first::FOLDS] for first in range(min(FOLDS, len(users)))]
    own = [choice.setting(kind, np.setdiff1d(users, part) if len(parts) > 1 else users) for part in parts]
    setting = choice.setting(kind, users)
    cross_fitted = np.empty(len(users))
    for part, chosen in zip(parts, own, strict=True):
        cross_fitted[part] = choice.memory_ndcg(chosen)[part]
    whole, *others = choice.memories([setting, *own])
    report = {
        "setting": asdict(setting),
        "users": len(users),
        "of": choice.held_out,
        "valid_ndcg@10": round(float(choice.memory_ndcg(setting).mean()), 5),
        "valid_ndcg@10_cross_fitted": round(float(cross_fitted.mean()), 5),
        "entries": len(whole.items),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return FittedMemory(whole, tuple(zip(parts, others, strict=True)), report, setting)
