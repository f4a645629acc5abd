"""What is gained by learning from the newest events before serving (`training/refit.py`): by the memory, by the network
and by the two mixed, as the trial on validation says and as the test does."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.accuracy import both_rules
from benchmarks.accuracy.both_rules import Rows
from benchmarks.accuracy.converged import BEAM, MEMORY, MIXED, memory_scores
from benchmarks.accuracy.full_ranking import rank
from benchmarks.accuracy.ranks import gain_over
from benchmarks.accuracy.walk_inputs import Inputs
from training.config import RefitConfig
from training.export import choose
from training.memory import fit_memory, make_memory
from training.metrics import ndcg, target_ranks
from training.refit import learn, try_on_half
from training.stages.loop import Log
from training.workspace import Workspace

EPOCHS = 2
PLAIN = "plain"
COLUMNS = ("split", "model", "newest", "excluded", "users", "ndcg@10", "gain", "low", "high", "percent", "against")
PROTOCOL = (
    "Leave-one-out, full ranking, history of 20 items; every row once with and once without the items of the history "
    "excluded. The converged network, the item memory and their join, all as validation left them; `newest`: network "
    f"({EPOCHS} epochs) and memory have learnt from the validation events too, the join and the settings as before. "
    "split valid: those of every second user are learnt from, and of the others at most choice_users are measured. "
    "split test: those of all are learnt from. gain: of NDCG@10 against the row named in `against`, of which the same "
    "model is the one that has not learnt, with a 95% interval by paired bootstrap over users."
)


def found(work: Workspace, excluded: bool) -> dict[str, np.ndarray]:
    """NDCG@10 of the test users by the memory, the network, and both mixed. Shape: (U,)."""
    assert work.neighbours is not None
    split, ranker = work.split, work.ranker()
    alone = replace(ranker, neighbours=None, settings=replace(work.settings, neighbours_weight=0.0, dense_candidates=0))
    ranked = {
        MEMORY: rank(memory_scores(work.neighbours), split.test_history, excluded),
        PLAIN: alone.rank(split.test_history, 0, BEAM, exclude_seen=excluded),
        MIXED: ranker.rank(split.test_history, 0, BEAM, exclude_seen=excluded),
    }
    return {name: ndcg(target_ranks(items, split.test_target)) for name, items in ranked.items()}


def compared(inputs: Inputs, seed: int) -> tuple[Rows, Rows]:
    """Rows by one rule, and the report of the trial on validation."""
    excluded, config = inputs.excluded, inputs.work.config
    by_rule = config.evaluation.model_copy(update={"exclude_seen": excluded})
    config = config.model_copy(update={"evaluation": by_rule, "refit": RefitConfig(epochs=EPOCHS), "seed": seed})
    work = replace(inputs.work, config=config)
    memory = fit_memory(inputs.data.items, work.split, config, inputs.cache)
    recount = partial(make_memory, memory.setting, inputs.data.items, config=config, cache=inputs.cache)
    work.settings, work.neighbours = choose(work, memory, steps=(0,)).settings, memory.whole
    folder = inputs.folder / f"excluded-{excluded}"
    with closing(Log(folder)) as log:
        trial = try_on_half(work, inputs.data, recount, folder, log)
        every = np.arange(len(work.split.valid_target))
        learnt = learn(work, inputs.data, every, recount, folder, log, "refit")
    rows: Rows = [
        {"split": "valid", "model": MIXED, "newest": True, "excluded": excluded, "users": trial["users"],
         "ndcg@10": trial["ndcg@10"], "against": MIXED, "gain": trial["gain"], "low": trial["gain_low"],
         "high": trial["gain_high"], "percent": round(100 * trial["gain"] / trial["ndcg@10_before"], 1)}
    ]  # fmt: skip
    before, after = found(work, excluded), found(learnt, excluded)
    for newest, each in ((False, before), (True, after)):
        for name, own in each.items():
            row = {"split": "test", "model": name, "newest": newest, "excluded": excluded, "users": len(own),
                   "ndcg@10": round(float(own.mean()), 5)}  # fmt: skip
            rows.append(row | ({"against": name} | gain_over(own, before[name]) if newest else {}))
            if name == MIXED:
                rows.append(row | {"against": f"{MEMORY}, as learnt"} | gain_over(own, each[MEMORY]))
    return rows, [{"excluded": excluded, **trial}]


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    return both_rules.answer(options, command, compared, COLUMNS, PROTOCOL)
