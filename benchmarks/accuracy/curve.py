"""Rows about the number of steps: accuracy, states and cost at every l on validation and test, 8-bit weights, and steps
for those users alone who seem to need them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.ablation import Ablation, Cell, Rows, at
from benchmarks.accuracy.costs import answer_ms, search_flops
from benchmarks.accuracy.ranks import Inference, evaluation_events, evaluation_users, gain_over, ranker_of
from benchmarks.accuracy.variants import DEPTH, SLOW
from serving.search.beam import reason, search_settings
from serving.search.ranker import of_some
from training.data.prepare import sample_events, sample_users
from training.int8_gate import overlap
from training.metrics import ndcg
from training.workspace import Workspace

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12)
PLAIN, AFTER_RL = "plain, as costly", "rl"
COMPARED_USERS = 1000  # of validation, whose lists are compared
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of validation users that take more steps


def curve(ablation: Ablation) -> Rows:
    """A network at every l, also those that it was not trained for, and the same after stage 3 with as many steps as it
    was trained for and without, each against its own answer without steps and against plain training as costly; then
    8-bit weights, and steps for some users alone."""
    lengths = ablation.lengths(LENGTHS)
    costs = costs_of(ablation, lengths)
    rows = [row for split in ("valid", "test") for row in rows_by_length(ablation, split, lengths)]
    rows += int8_rows(ablation)
    for row in rows:
        row |= costs[row["steps"], row.get("weights") == "int8"]  # one shape of network
    return rows + [row for variant in (SLOW, AFTER_RL) for row in selective_rows(ablation, variant)]


def costs_of(ablation: Ablation, lengths: list[int]) -> dict[tuple[int, bool], dict[str, float]]:
    """Of an answer by (l, whether with 8-bit weights). cpu_ratio: processor time relative to l = 0 with float32."""
    work = ablation.work(SLOW, ablation.seeds[0])
    kinds = [Inference("test", length, int8=int8) for int8 in (False, True) for length in lengths]
    spent = answer_ms([(work, inference) for inference in kinds])
    flops = {length: round(search_flops(work, Inference("test", length)) / 1e6, 1) for length in lengths}
    return {
        (inference.steps, inference.int8): {
            "answer_mflops": flops[inference.steps],
            "cpu_ratio": round(ms / spent[0], 3),
        }
        for inference, ms in zip(kinds, spent, strict=True)
    }


def rows_by_length(ablation: Ablation, split: str, lengths: list[int]) -> Rows:
    def cell(variant: str, steps: int) -> Cell:
        return replace(at(variant, steps), inference=Inference(split, steps))

    plain = cell(PLAIN, 0)
    rows = [ablation.row(plain, None), ablation.row(cell("plain", 0), plain)]
    for variant, asked in ((SLOW, lengths), (AFTER_RL, [0, DEPTH])):
        direct = cell(variant, 0)
        for length in asked:
            own = cell(variant, length)
            facts = state_facts(ablation, own)
            if length and split == "valid":
                facts["overlap@10"] = list_overlap(ablation, own, direct)
            rows.append(ablation.row(own, direct if length else None) | facts)
            rows.append(ablation.row(own, plain))
    return rows


def state_facts(ablation: Ablation, cell: Cell) -> dict[str, float]:
    """Means over users of cos(s_l, t), and, after a step, of cos(s_l, s_(l-1))."""
    found = ablation.target_ranks(cell.variant, cell.inference)
    facts = {"cosine": _mean([one.cosine[-1].mean() for one in found])}
    return facts | ({"settled": _mean([one.settled[-1].mean() for one in found])} if cell.inference.steps else {})


def list_overlap(ablation: Ablation, one: Cell, other: Cell) -> float:
    """Mean share of the ten items that two ways to answer have in common, over some validation users."""
    shared = []
    for work in (ablation.work(one.variant, seed) for seed in ablation.seeds):
        histories, _ = sample_users(work.split.valid_history, work.split.valid_target, COMPARED_USERS)
        events, beam = sample_events(work.split.valid_events, COMPARED_USERS), work.config.evaluation.beam
        found = []
        for inference in (one.inference, other.inference):
            ranker = replace(ranker_of(work, inference), settings=work.settings)
            found.append(ranker.rank(histories, inference.steps, beam, events=events))
        shared.append(overlap(*found))
    return _mean(shared)


def int8_rows(ablation: Ablation) -> Rows:
    """The decoder's weights in 8 bits against float32 at the same l."""
    rows = []
    for length in (0, DEPTH):
        whole = at(SLOW, length)
        small = replace(whole, model=f"{whole.model}, int8", inference=Inference("test", length, int8=True))
        facts = {"overlap@10": list_overlap(ablation, small, whole), "weights": "int8"}
        rows.append(ablation.row(small, whole) | facts)
    return rows


def selective_rows(ablation: Ablation, variant: str) -> Rows:
    """`DEPTH` steps for those users alone whose beam begins unsure without steps, or whose first step moves the state.

    A rule's threshold is the quantile of its measure over validation users that gives a share of them the steps. Every
    share is shown, and `chosen` is the one of validation. Two rows each: against no steps for anybody, and against the
    same share of steps given by lot, which is what the rule has to beat.
    """
    works = [ablation.work(variant, seed) for seed in ablation.seeds]
    rows = []
    for rule in ("unsure", "moved"):
        measure = {}
        for split in ("valid", "test"):
            found = ablation.target_ranks(variant, Inference(split, DEPTH))
            moved = [1 - one.settled[0] for one in found]
            measure[split] = np.stack(
                moved if rule == "moved" else [first_level_entropy(work, split) for work in works]
            )
        head = {"model": f"{variant}: steps where {rule}", "part": "selective", "arm": variant, "rule": rule}
        values = {
            split: [ndcg(ablation.ranks(Cell(variant, variant, Inference(split, length)))) for length in (DEPTH, 0)]
            for split in measure
        }
        rows += rows_by_share(head, measure, values, DEPTH)
    return rows


def rows_by_share(
    head: dict[str, Any], measure: dict[str, np.ndarray], values: dict[str, list[np.ndarray]], steps: int
) -> Rows:
    """By split: measure (seeds, U), high where steps are taken; values, NDCG@10 with steps and without, (seeds, U)."""
    thresholds = [np.inf, *(np.quantile(measure["valid"], 1 - share) for share in SHARES[1:-1]), -np.inf]
    by_valid = [np.where(measure["valid"] >= each, *values["valid"]).mean() for each in thresholds]
    chosen, rows = int(np.argmax(by_valid)), list[dict[str, Any]]()
    deep, direct = values["test"]
    for number, (share, threshold) in enumerate(zip(SHARES, thresholds, strict=True)):
        takes = measure["test"] >= threshold
        own = np.where(takes, deep, direct).mean(0)
        row = head | {"split": "test", "share": share, "chosen": number == chosen,
                      "mean_steps": round(steps * _mean(takes), 2),
                      "valid": round(float(by_valid[number]), 5), "ndcg@10": round(float(own.mean()), 5)}  # fmt: skip
        if not share:
            rows.append(row)
            continue
        rows.append(row | {"against": "no steps"} | gain_over(own, direct.mean(0)))
        if share < 1:
            lot = (takes.mean() * deep + (1 - takes.mean()) * direct).mean(0)
            more = {"threshold": round(float(threshold), 4), "against": "as many steps by lot"}
            rows.append(row | more | gain_over(own, lot))
    return rows


@torch.inference_mode()
def first_level_entropy(work: Workspace, split: str) -> np.ndarray:
    """How unsure the beam begins: of the distribution over an item's first token at l = 0, in nats. Shape: (U,)."""
    (histories, _), events = evaluation_users(work, split), evaluation_events(work, split)
    ranker, settings = work.ranker(), search_settings(work.vocabulary, work.settings)
    entropy = np.empty(len(histories))
    for index in ranker.batches(histories):
        batch = ranker.encode([histories[i] for i in index], of_some(events, index))
        log_p = reason(ranker.runtime, settings, batch.cross, 0).first_log_probs[:, 0]
        entropy[index] = -(log_p.exp() * log_p).sum(-1).numpy()
    return entropy


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)
