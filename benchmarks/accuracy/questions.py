"""The questions: which variants each needs, and which rows answer it. Every gain in a row is against the row it names.

The rows are made in `reasoning.py`, `recipes.py` and `curve.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy import curve, plots, reasoning, recipes
from benchmarks.accuracy.ablation import Ablation, Rows
from benchmarks.accuracy.variants import OWN, REWARDS, SLOW

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
GAIN = ("gain", "low", "high", "percent")


@dataclass(frozen=True, slots=True)
class Question:
    """variants: what must be trained. rows: the answer. draw: its plot."""

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
        "accuracy against the number of steps",
        ("plain", "every l", *(f"l = {length}" for length in OWN)),
        reasoning.steps,
        ("model", "dense_weight", *METRICS, *GAIN, "minutes"),
        plots.steps,
    ),
    "curve": Question(
        "one network at every number of steps, and who needs any",
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
        "what reasoning steps are made of",
        (SLOW, "plain, as costly", "state loss alone", *list(reasoning.REASONING.values())[1:], "random"),
        reasoning.tokens,
        ("model", "part", "dense_weight", *METRICS, *GAIN, "against"),
        _bars("against plain of the same cost, unless another is named"),
    ),
    "compute": Question(
        "the same training compute without reasoning",
        ("plain", SLOW, "every l", "plain, as costly"),
        reasoning.compute,
        COSTED,
        _bars("against plain of the same cost"),
    ),
    "grown": Question(
        "the same compute per answer without reasoning",
        (SLOW, "every l", "plain, as costly", "plain, grown"),
        reasoning.grown,
        COSTED,
        _bars("against the grown model"),
    ),
    "paths": Question("several reasoning paths", (SLOW, "random"), reasoning.paths, GAINED, _bars("against one path")),
    "drift": Question(
        "how reasoning fails",
        ("every l", SLOW, "token alone"),
        reasoning.drift,
        ("arm", "steps", "step", "cosine", "entropy", "unparsable"),
        plots.drift,
    ),
    "adaptive": Question(
        "stop when settled", ("every l",), reasoning.adaptive, ("model", "mean_steps", "ndcg@10", *GAIN), plots.adaptive
    ),
    "joined": Question(
        "beam and dense score",
        (SLOW, "state loss alone"),
        reasoning.joined,
        ("model", "dense_weight", *METRICS, *GAIN),
        _bars("against the beam alone"),
    ),
    "deployed": Question(
        "the model a shop would run",
        ("plain", SLOW),
        reasoning.deployed,
        ("model", "way", *METRICS, *GAIN, "against"),
        _bars("against tuned neighbours, or what is named after the bar"),
    ),
    "pays": Question(
        "does reasoning pay, with every control",
        ("plain", *reasoning.PAYING, "plain, as costly"),
        reasoning.pays,
        ("model", "way", "dense_weight", *METRICS, *GAIN, "against", "minutes"),
        _bars("against plain of the same cost, unless another is named"),
    ),
    "groups": Question(
        "who gains",
        (SLOW, "every l"),
        reasoning.groups,
        ("group", "arm", "steps", "users", "ndcg@10", *GAIN),
        _bars("against no steps"),
    ),
    "losses": Question(
        "the losses of stage 2", (SLOW, *recipes.LOSSES), recipes.losses, COMPARED, _bars("against all losses")
    ),
    "recipe": Question(
        "the paper's recipe", (SLOW, *recipes.RECIPE), recipes.recipe, COMPARED, _bars("against the default recipe")
    ),
    "open_choices": Question(
        "what the paper leaves open",
        ("plain", SLOW, *recipes.CHOICES, "plain, shared codes", "rl", *recipes.RL_CHOICES),
        recipes.open_choices,
        COMPARED,
        _bars("against the default choice, or what is named after the bar"),
    ),
    "pretraining": Question(
        "similar items in stage 1",
        ("plain", SLOW, "similar items", "similar items, then stage 2"),
        recipes.pretraining,
        COMPARED,
        _bars("with similar items against without"),
    ),
    "times": Question(
        "the time since an event",
        ("packed", "packed, with times"),
        recipes.times,
        (*COMPARED, "spread"),
        _bars("with times against without"),
    ),
    "rl": Question("stage 3", (SLOW, "rl", "rl, anchor alone"), recipes.rl, COMPARED, _bars("against stage 2")),
    "rewards": Question(
        "the rewards of stage 3",
        ("rl", *(f"rl, no {name}" for name in REWARDS)),
        recipes.rewards,
        COMPARED,
        _bars("without a reward against all five"),
    ),
    "prior": Question(
        "reasoning without labels",
        (SLOW, "rl", "no labels", "rl, no labels"),
        recipes.prior,
        COMPARED,
        _bars("without labels against with"),
    ),
    "tokenizer": Question(
        "semantic IDs", ("plain", "random ids", "given ids"), recipes.tokenizer, COMPARED, _bars("against RQ-VAE")
    ),
    "compression": Question(
        "fewer steps, fewer bits",
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
