"""Compares steps between an item's tokens with what they must beat: the same weights without steps, pauses at the same
place, plain training, and as many steps given by lot."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.ablation import Ablation, Rows
from benchmarks.accuracy.curve import first_level_entropy, rows_by_share
from benchmarks.accuracy.interleaved import InterleavedStep, Steps, begin_steps, search
from benchmarks.accuracy.ranks import Inference, evaluation_events, evaluation_users, gain_over, rank_of_target
from benchmarks.accuracy.variants import SLOW, VARIANTS, Setup, training_minutes
from benchmarks.common import commit, record, table
from serving.search.ranker import of_some
from training.data.prepare import sample_events, sample_users
from training.metrics import mean_metrics, ndcg
from training.stages.loop import Log, run_stage
from training.workspace import Workspace

PLAIN, COSTLY = "plain", "plain, as costly"  # variants of `variants.py`, trained first
PAUSE = "pause before the second level"
ARMS = {  # the levels that have a step before them, counted from 0, and whether it is a pause
    PAUSE: ((1,), True),  # the first, for the others are compared with it
    "before the first level": ((0,), False),
    "before the second level": ((1,), False),
    "before both": ((0, 1), False),
}
NONE, SPLITS = Steps((), (), 0, ()), ("valid", "test")
LEAST_ENTROPY = 0.25  # of the steps' tokens over users, a share of its maximum: below it they tell no users apart
COLUMNS = ("model", "recall@10", "ndcg@10", "gain", "low", "high", "percent", "against", "share", "chosen")
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items, seen items permitted, one beam for all rows. Every arm "
    "goes on from the converged network of `plain` as stage 2 does, and keeps its best weights by the mean validation "
    "NDCG@10 without and with steps. gain: of NDCG@10 against the row named in `against`, with a 95% interval by "
    "paired bootstrap over users. minutes: training, stage 1 included."
)


def ranks(
    work: Workspace, steps: Steps, histories: list[np.ndarray], target: np.ndarray, events: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of every user's target, and the tokens of the best item's steps. Shapes: (U,), (U, steps) int64."""
    ranker, beam = work.ranker(), work.config.evaluation.beam
    found = np.empty(len(target), np.int64)
    tokens = np.empty((len(target), len(steps.before)), np.int64)
    for index in ranker.batches(histories):
        batch = ranker.encode([histories[i] for i in index], of_some(events, index))
        items, _, written = search(ranker.runtime, work, batch.cross, steps, beam)
        wanted = work.send(target[index].astype(np.int64))
        in_order = -torch.arange(items.shape[1], device=items.device, dtype=torch.float32).expand(items.shape)
        found[index] = rank_of_target(items, in_order, wanted, beam).cpu().numpy()
        tokens[index] = written.cpu().numpy()
    return found, tokens


def entropy(tokens: np.ndarray) -> float:
    """Of the tokens that a step wrote over users, in nats; the mean over steps. Shape: (U, steps)."""
    each = []
    for column in tokens.T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        each.append(float(-(share * np.log(share)).sum()))
    return float(np.mean(each))


def train_arm(ablation: Ablation, name: str, seed: int) -> tuple[Workspace, Steps, dict[str, Any]]:
    """An arm with its best weights, and what says whether it acts. A finished one is read back."""
    start = ablation.work(PLAIN, seed)
    work = start.with_network(copy.deepcopy(start.network))
    config = ablation.config(SLOW).sft
    steps = begin_steps(work, *ARMS[name])
    lo, hi = work.vocabulary.reasoning_range
    before = work.network.t5.shared.weight[lo:hi].detach().clone()
    folder = ablation.setup.work / "interleaved" / f"{name.replace(' ', '-')}-seed-{seed}"
    histories, target = sample_users(
        work.split.valid_history, work.split.valid_target, work.config.evaluation.valid_users
    )
    events = sample_events(work.split.valid_events, work.config.evaluation.valid_users)

    def evaluate() -> dict[str, Any]:
        direct, _ = ranks(work, NONE, histories, target, events)
        stepped, tokens = ranks(work, steps, histories, target, events)
        found = {"ndcg@10/direct": float(ndcg(direct).mean()), "ndcg@10/steps": float(ndcg(stepped).mean())}
        return found | {"score": float(np.mean(list(found.values()))), "entropy": entropy(tokens)}

    log = Log(folder)
    outcome = run_stage("sft", work.network, config, seed, folder, InterleavedStep(work, config, steps), evaluate, log,
                        precision=work.config.precision, start_competes=False)  # fmt: skip
    log.close()
    after = work.network.t5.shared.weight[lo:hi].detach()
    moved = float((after - before)[: steps.count * len(steps.before)].norm() / before.norm())
    varied = steps.count == 1 or outcome.best["entropy"] > LEAST_ENTROPY * np.log(steps.count)
    return (
        work,
        steps,
        {
            "model": name,
            "best_step": outcome.best_step,
            "entropy": round(outcome.best["entropy"], 3),
            "moved": round(moved, 4),
            "minutes": round(outcome.seconds / 60, 1),
            "acts": outcome.best_step > 0 and moved > 0 and bool(varied),
        },
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One answer. Ranks by split: (U,). minutes: of training. steps: their number."""

    name: str
    ranks: dict[str, np.ndarray]
    minutes: float
    steps: int

    def row(self, other: Measured | None = None) -> dict[str, Any]:
        """The test's row, with its gain over another's."""
        own, metrics = self.ranks["test"], mean_metrics(self.ranks["test"])
        row = {"model": self.name, "steps": self.steps, "users": len(own), "minutes": round(self.minutes, 1)}
        row |= {metric: round(value, 5) for metric, value in metrics.items()}
        return row if other is None else row | {"against": other.name} | gain_over(ndcg(own), ndcg(other.ranks["test"]))


def trained_before(ablation: Ablation, variant: str, seed: int) -> Measured:
    """The start of all arms, or what they are compared with."""
    found = {split: ablation.target_ranks(variant, Inference(split, 0))[0].rank(0.0) for split in SPLITS}
    return Measured(variant, found, training_minutes(ablation.setup.folder(variant, seed), VARIANTS[variant].until), 0)


def rows_of(ablation: Ablation, seed: int) -> tuple[Rows, Rows]:
    """The test's rows of all arms that act, and the checks of all."""
    plain, costly = (trained_before(ablation, variant, seed) for variant in (PLAIN, COSTLY))
    rows, selective, checks = [costly.row(), plain.row(costly)], list[dict[str, Any]](), list[dict[str, Any]]()
    pause: Measured | None = None
    for name in ARMS:
        work, steps, check = train_arm(ablation, name, seed)
        print(json.dumps(check), file=sys.stderr, flush=True)
        checks.append(check)
        if not check["acts"]:
            continue
        users = {split: (*evaluation_users(work, split), evaluation_events(work, split)) for split in SPLITS}
        minutes, number = plain.minutes + check["minutes"], len(steps.before)
        without = {split: ranks(work, NONE, *users[split])[0] for split in SPLITS}
        direct = Measured(f"{name}, without", without, minutes, 0)
        stepped = Measured(name, {split: ranks(work, steps, *users[split])[0] for split in SPLITS}, minutes, number)
        others = [direct, costly] if pause is None else [direct, costly, pause]
        rows += [direct.row(costly), *(stepped.row(other) for other in others)]
        pause = stepped if name == PAUSE else pause
        unsure = {split: first_level_entropy(work, split)[None] for split in SPLITS}
        values = {split: [ndcg(one.ranks[split])[None] for one in (stepped, direct)] for split in SPLITS}
        selective += rows_by_share({"model": f"{name}, where unsure", "part": "selective"}, unsure, values, number)
    return rows + selective, checks


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """Trains what is missing, writes the result, prints the table."""
    code, began = commit(), time.perf_counter()
    setup = Setup(options.data, options.work, options.config, tuple(options.set), options.device)
    seed = int(options.seeds)
    ablation = Ablation(setup, (seed,))
    for variant in (PLAIN, SLOW, COSTLY):  # the last costs what the one before does
        ablation.train(variant)
    rows, checks = rows_of(ablation, seed)
    minutes = round((time.perf_counter() - began) / 60, 1)
    record(options.out, command, [seed], rows, minutes=minutes, data=options.data.resolve().name, protocol=PROTOCOL,
           checks=checks, **code)  # fmt: skip
    print(table(rows, COLUMNS))
    return 0
