"""Questions about one thing changed at a time, on checkpoints that share ancestors: which variants each needs, and
which rows answer it. Every gain in a row is against the row it names.

The rows are made in `reasoning.py`, `recipes.py` and `curve.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy import curve, plots, reasoning, recipes
from benchmarks.accuracy.ablation import Ablation, Rows
from benchmarks.accuracy.variants import OWN, REWARDS, SLOW, Setup
from benchmarks.common import commit, record, table

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
GAIN = ("gain", "low", "high", "percent")
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items, seen items permitted, one beam for all rows. Settings and "
    "weights were chosen by validation NDCG@10 (`validation`). gain: of NDCG@10 against the row named in `against`, "
    "with a 95% interval by paired bootstrap over users. minutes: training, ancestors included, on a core shared with "
    "other work."
)


@dataclass(frozen=True, slots=True)
class Question:
    """about: what it asks. variants: what must be trained. rows: the answer. draw: its plot."""

    about: str
    variants: tuple[str, ...]
    rows: Callable[[Ablation], Rows]
    columns: tuple[str, ...]
    draw: Callable[[Rows, Any], None]


def _bars(title: str) -> Callable[[Rows, Any], None]:
    return lambda rows, path: plots.bars(rows, path, title)


COMPARED = ("model", "steps", *METRICS, *GAIN, "against", "minutes")
COSTED = (*COMPARED, "parameters", "training_tflops", "answer_mflops")
GAINED = ("model", *METRICS, *GAIN)
QUESTIONS = {
    "steps": Question(
        "numbers of reasoning steps, from one checkpoint and from a checkpoint each",
        ("plain", "every l", *(f"l = {length}" for length in OWN)),
        reasoning.steps,
        ("model", "dense_weight", *METRICS, *GAIN, "minutes"),
        plots.steps,
    ),
    "curve": Question(
        "one network at every number of steps on validation and test, its cost, and steps for some users alone",
        ("plain", SLOW, curve.AFTER_RL, curve.PLAIN),
        curve.curve,
        (
            "model",
            "split",
            "share",
            "recall@10",
            "ndcg@10",
            *GAIN,
            "against",
            "cosine",
            "settled",
            "overlap@10",
            "answer_mflops",
            "cpu_ratio",
        ),
        _bars("against no steps, or what is named after the bar"),
    ),
    "tokens": Question(
        "residual, pause and random tokens, the fed-back state, and the state's loss alone",
        (SLOW, "plain, as costly", "state loss alone", *list(reasoning.REASONING.values())[1:], "random"),
        reasoning.tokens,
        ("model", "part", "dense_weight", *METRICS, *GAIN, "against"),
        _bars("against plain of the same cost, unless another is named"),
    ),
    "compute": Question(
        "plain models of the same training cost",
        ("plain", SLOW, "every l", "plain, as costly"),
        reasoning.compute,
        COSTED,
        _bars("against plain of the same cost"),
    ),
    "grown": Question(
        "plain models whose answer costs the same",
        (SLOW, "every l", "plain, as costly", "plain, grown"),
        reasoning.grown,
        COSTED,
        _bars("against the grown model"),
    ),
    "paths": Question(
        "several reasoning paths against one", (SLOW, "random"), reasoning.paths, GAINED, _bars("against one path")
    ),
    "drift": Question(
        "what states and tokens do after each step",
        ("every l", SLOW, "token alone"),
        reasoning.drift,
        ("arm", "steps", "step", "cosine", "entropy", "unparsable"),
        plots.drift,
    ),
    "adaptive": Question(
        "stopping once the state has settled",
        ("every l",),
        reasoning.adaptive,
        ("model", "mean_steps", "ndcg@10", *GAIN),
        plots.adaptive,
    ),
    "joined": Question(
        "the beam alone and joined with the dense score",
        (SLOW, "state loss alone"),
        reasoning.joined,
        ("model", "dense_weight", *METRICS, *GAIN),
        _bars("against the beam alone"),
    ),
    "deployed": Question(
        "tuned neighbours, the item memory and its parts alone, networks alone, and both mixed through the gate that "
        "validation fits",
        ("plain", SLOW),
        reasoning.deployed,
        ("model", "way", *METRICS, *GAIN, "against"),
        _bars("against tuned neighbours, or what is named after the bar"),
    ),
    "pays": Question(
        "all controls in one table: reasoning and plain training of the same cost, stage 3 and its anchor alone, and "
        "what `deployed` asks",
        ("plain", *reasoning.PAYING, "plain, as costly"),
        reasoning.pays,
        ("model", "way", "dense_weight", *METRICS, *GAIN, "against", "minutes"),
        _bars("against plain of the same cost, unless another is named"),
    ),
    "groups": Question(
        "gains by kinds of users and items",
        (SLOW, "every l"),
        reasoning.groups,
        ("group", "arm", "steps", "users", "ndcg@10", *GAIN),
        _bars("against no steps"),
    ),
    "losses": Question(
        "stage 2 without each of its losses",
        (SLOW, *recipes.LOSSES),
        recipes.losses,
        COMPARED,
        _bars("against all losses"),
    ),
    "recipe": Question(
        "stage 2 nearer to the paper's recipe, one point at a time",
        (SLOW, *recipes.RECIPE),
        recipes.recipe,
        COMPARED,
        _bars("against the default recipe"),
    ),
    "open_choices": Question(
        "what the paper leaves open, chosen otherwise",
        ("plain", SLOW, *recipes.CHOICES, "plain, shared codes", "rl", *recipes.RL_CHOICES),
        recipes.open_choices,
        COMPARED,
        _bars("against the default choice, or what is named after the bar"),
    ),
    "pretraining": Question(
        "similar items as targets in stage 1",
        ("plain", SLOW, "similar items", "similar items, then stage 2"),
        recipes.pretraining,
        COMPARED,
        _bars("with similar items against without"),
    ),
    "times": Question(
        "a decoder that sees how long ago each event was (`model.time_bias`), against one that does not",
        ("packed", "packed, with times"),
        recipes.times,
        (*COMPARED, "spread"),
        _bars("with times against without"),
    ),
    "rl": Question(
        "stage 3, and its anchor alone",
        (SLOW, "rl", "rl, anchor alone"),
        recipes.rl,
        COMPARED,
        _bars("against stage 2"),
    ),
    "rewards": Question(
        "stage 3 without each of its rewards",
        ("rl", *(f"rl, no {name}" for name in REWARDS)),
        recipes.rewards,
        COMPARED,
        _bars("without a reward against all five"),
    ),
    "prior": Question(
        "reasoning trained without labels",
        (SLOW, "rl", "no labels", "rl, no labels"),
        recipes.prior,
        COMPARED,
        _bars("without labels against with"),
    ),
    "tokenizer": Question(
        "learnt, random and given semantic IDs",
        ("plain", "random ids", "given ids"),
        recipes.tokenizer,
        COMPARED,
        _bars("against RQ-VAE"),
    ),
    "compression": Question(
        "8-bit weights, and a student distilled to need no steps",
        (SLOW, "distilled"),
        reasoning.compression,
        (*GAINED, "answer_ms", "answer_mflops"),
        plots.pareto,
    ),
}
FORMER_NAMES = {"choices": "open_choices", "small": "compression"}  # in recorded commands and file names


def current_name(question: str) -> str:
    """The name of a question, given that or its former one."""
    return FORMER_NAMES.get(question, question)


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """Trains what is missing, writes the result, prints the table."""
    question, code = QUESTIONS[options.question], commit()
    if options.question == "compression" and options.device != "cpu":
        parser.error("compression measures 8-bit weights, which run on a CPU; leave --device out")
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    except ValueError:
        parser.error(f"--seeds takes whole numbers separated by commas, not {options.seeds!r}")
    ablation = Ablation(Setup(options.data, options.work, options.config, tuple(options.set), options.device), seeds)
    wanted = [variant for variant in question.variants if ablation.permits(variant)]
    if options.only and options.only not in wanted:
        parser.error(f"--only takes one of {', '.join(wanted)}")
    for variant in [options.only] if options.only else wanted:
        ablation.train(variant)
    if options.only:
        return 0
    measuring = time.perf_counter()
    rows = question.rows(ablation)
    minutes = round(ablation.minutes(wanted) + (time.perf_counter() - measuring) / 60, 1)
    record(
        options.out,
        command,
        seeds,
        rows,
        minutes=minutes,
        data=options.data.resolve().name,
        protocol=PROTOCOL,
        validation=ablation.validation,
        checks=ablation.checks(wanted),
        **code,
        **ablation.trained_by(wanted),
    )
    same = ("same_checkpoint_as",) if any("same_checkpoint_as" in row for row in rows) else ()
    print(table(rows, (*question.columns, *same)))
    return 0
