"""Lets a model learn from the events that validation held out, once validation has chosen everything else.

They are the newest, and say most of what comes next. It is tried first: network and memory learn from those of every
second user, and the others' judge the answer as it is served, before and after. Only where it has become better do both
learn from the events of all users; on these, nothing can be measured afterwards. [open: not in the paper.]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.items.neighbours import Neighbours
from training.data.examples import Examples, as_windows, newest_targets, steps_per_epoch
from training.data.prepare import Split, sample_events, sample_users, with_newest
from training.data.read import Dataset
from training.evaluate import measure
from training.metrics import ndcg, paired_gain, target_ranks
from training.stages.distributed import Process
from training.stages.loop import Log, run_stage
from training.stages.pretrain import PretrainStep
from training.stages.sft import SftStep
from training.workspace import Workspace

WARMUP = 4  # the learning rate rises for a fourth of the steps
TRIAL = "refit-trial"  # the stage that every run goes through; the one after it follows where the trial gains
STEPS = {"pretrain": PretrainStep, "sft": SftStep}
Recount = Callable[[Split], Neighbours]


def refit(work: Workspace, data: Dataset, recount: Recount | None, folder: Path) -> tuple[Workspace, dict[str, Any]]:
    """The workspace to serve, `work` itself where learning makes the answer no better, and a report for `about`.

    work: with the settings and the memory that would be served without. recount: the memory of another training part;
    None: there is none. folder: of the run, for checkpoints.
    """
    with closing(Log(folder)) as log:
        trial = try_on_half(work, data, recount, folder, log)
        kept = trial["gain"] > 0
        if kept:
            work = learn(work, data, np.arange(len(work.split.valid_target)), recount, folder, log, "refit")
    return work, {"kept": kept, "trial": trial}


def try_on_half(work: Workspace, data: Dataset, recount: Recount | None, folder: Path, log: Log) -> dict[str, Any]:
    """What every second user's events teach the answers to the others, see `compare_on`. Arguments as of `learn`."""
    users = np.arange(len(work.split.valid_target))
    learners, judges = users[::2], users[1::2]
    tried = learn(work, data, learners, recount, folder, log, TRIAL)
    return {"learnt_from": len(learners), **compare_on(judges, work, tried)}


def learn(
    work: Workspace, data: Dataset, users: np.ndarray, recount: Recount | None, folder: Path, log: Log, stage: str
) -> Workspace:
    """A copy whose network and memory have learnt from the validation events of some users, and whose training part
    has them. The stage resumes from `folder`. users: positions in `valid_users`."""
    config, split = work.config, with_newest(data, work.split, users)
    examples = _newest(split, users, config.model.max_items)
    windows = None if work.windows is None else as_windows(examples)
    supervised = work.stage_config(config.last_supervised)
    steps = config.refit.epochs * steps_per_epoch(windows or examples, supervised.batch_size)
    of_stage = {"steps": steps, "lr": config.refit.lr, "warmup": steps // WARMUP, "eval_every": 0, "patience": 0}
    learner = replace(work, examples=examples, windows=windows,
                      network=copy.deepcopy(work.network))  # fmt: skip
    step = STEPS[config.last_supervised](learner, supervised.model_copy(update=of_stage))
    run_stage(stage, learner.network, step.config, config.seed, folder, step, None, log,
              Process(device=work.device), config.precision, kept=step.kept)  # fmt: skip
    return replace(work, split=split, network=learner.network, neighbours=recount(split) if recount else None)


def compare_on(users: np.ndarray, before: Workspace, after: Workspace) -> dict[str, Any]:
    """NDCG@10 of the answer as it is served to some validation users, and the gain. users: as in `learn`."""
    split, evaluation = before.split, before.config.evaluation
    histories, target = sample_users(
        [split.valid_history[user] for user in users], split.valid_target[users], evaluation.choice_users
    )
    events = split.valid_events and sample_events([split.valid_events[user] for user in users], evaluation.choice_users)
    found = []
    for work in (before, after):
        _, ranked = measure(work.ranker(), histories, target, work.settings.default_steps, evaluation.beam,
                            exclude_seen=evaluation.exclude_seen, events=events)  # fmt: skip
        found.append(ndcg(target_ranks(ranked, target)))
    without, learnt = found
    means = {"ndcg@10": round(float(learnt.mean()), 5), "ndcg@10_before": round(float(without.mean()), 5)}
    return {"users": len(target), "of": len(users), **means, **paired_gain(learnt, without)}


def _newest(split: Split, users: np.ndarray, max_items: int) -> Examples:
    """The newest event of each of some users, which is the last of the training part, as an example."""
    rows = np.flatnonzero(np.isin(split.train_users, split.valid_users[users]))
    times = None
    if split.train_events is not None and split.train_events[0].times is not None:
        times = [np.asarray(split.train_events[row].times) for row in rows]
    return newest_targets([split.train[row] for row in rows], max_items, times)
