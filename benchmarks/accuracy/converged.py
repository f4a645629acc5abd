"""What a converged plain network is worth: its beam, its dense score, the two joined, and both mixed with the memory.

Rows with seen items permitted and excluded have a memory and a join of their own, chosen on validation by the rule that
they are measured by. Gains are of NDCG@10 against the memory alone. What `neighbours.candidates` saves is measured by a
row with MORE of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.full_ranking import HISTORY_ITEMS, Score
from benchmarks.accuracy.full_ranking import rank as rank_scores
from benchmarks.accuracy.ranks import gain_over
from serving.items.neighbours import Neighbours
from serving.types import BundleSettings
from training.data.read import Dataset
from training.export import choose
from training.memory import fit_memory
from training.metrics import mean_metrics, ndcg, target_ranks
from training.workspace import Workspace

BEAM = 50
MEMORY = "memory alone"
MIXED = "plain, and memory"
MORE = 50  # candidates


def rows(work: Workspace, data: Dataset, cache: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """The test's rows, without reasoning steps; with the item memory where it is enabled. minutes: of training."""
    for excluded in (False, True):
        by_rule = work.config.evaluation.model_copy(update={"exclude_seen": excluded})
        own = replace(work, config=work.config.model_copy(update={"evaluation": by_rule}))
        joined = choose(own, steps=(0,)).settings
        ranks = {
            "plain": _ranks(own, own.settings, excluded),
            "state alone": _found(own, own.ranker().rank_by_state(own.split.test_history, 0, exclude_seen=excluded)),
            "plain, dense score joined": _ranks(own, joined, excluded),
        }
        weights = {"plain, dense score joined": joined.dense_weight}
        if own.config.neighbours.enabled:
            memory = fit_memory(data.items, own.split, own.config, cache)
            own.neighbours = memory.whole
            ranks[MEMORY] = _found(own, rank_scores(memory_scores(memory.whole), own.split.test_history, excluded))
            for count, name in ((own.config.neighbours.candidates, MIXED), (MORE, f"{MIXED}, {MORE} candidates")):
                neighbours = own.config.neighbours.model_copy(update={"candidates": count})
                asked = replace(own, config=own.config.model_copy(update={"neighbours": neighbours}))
                mixed = choose(asked, memory, steps=(0,)).settings
                ranks[name] = _ranks(own, mixed, excluded)
                weights[name] = mixed.dense_weight
        for name, found in ranks.items():
            row = {"model": name, "excluded": excluded, "users": len(found), "dense_weight": weights.get(name, 0.0)}
            row |= {metric: round(value, 5) for metric, value in mean_metrics(found).items()}
            if name != MEMORY:
                row["minutes"] = round(minutes, 1)
                if MEMORY in ranks:
                    row["against"] = MEMORY
                    row |= gain_over(ndcg(found), ndcg(ranks[MEMORY]))
            yield row


def curve(work: Workspace, folder: Path) -> Iterator[dict[str, Any]]:
    """What validation said of stage 1 after so many epochs, from the run's log."""
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["stage"] == "pretrain" and "score" in entry:
            epochs = entry["step"] * work.config.pretrain.batch_size / len(work.examples)
            figures = {name: entry[name] for name in ("ndcg@10/l0", "ndcg@10/state")}
            yield {"step": entry["step"], "epochs": round(epochs, 1), **figures}


def _ranks(work: Workspace, settings: BundleSettings, excluded: bool) -> np.ndarray:
    ranker = replace(work.ranker(), settings=settings)
    return _found(work, ranker.rank(work.split.test_history, 0, BEAM, exclude_seen=excluded))


def _found(work: Workspace, ranked: np.ndarray) -> np.ndarray:
    return target_ranks(ranked, work.split.test_target)


def memory_scores(memory: Neighbours) -> Score:
    return lambda histories: memory.shares(histories, HISTORY_ITEMS)[0].dense(len(memory))
