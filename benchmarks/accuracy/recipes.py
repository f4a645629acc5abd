"""Rows about the recipe: one choice of training made otherwise, at the same number of steps."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy.ablation import Ablation, Cell, Rows, at
from benchmarks.accuracy.ranks import Inference
from benchmarks.accuracy.variants import DEPTH, REWARDS, SLOW

LOSSES = ("no labels", "no quantization", "no state loss", "no direct answer")
RECIPE = ("in-batch contrast", "preference", "labels as input")
CHOICES = ("shared codes", "more reasoning weight")
RL_CHOICES = ("rl, group of 16", "rl, rate of 3e-5")


def losses(ablation: Ablation) -> Rows:
    """Stage 2 with each loss taken out, against the whole at the same number of steps."""
    return _against_whole(ablation, LOSSES)


def recipe(ablation: Ablation) -> Rows:
    """Stage 2 nearer to the paper's recipe in one point, against the whole at the same number of steps."""
    return _against_whole(ablation, RECIPE)


def open_choices(ablation: Ablation) -> Rows:
    """What the paper leaves open chosen otherwise, in stage 2 and in stage 3. Reasoning tokens that are item codes need
    a stage 1 of their own: what that does to plain answers, and what reasoning adds to them."""
    plain, shared, pair = "plain", "plain, shared codes", {"part": "pair"}
    own = [at(plain, 0), at(shared, 0, against=plain, more=pair)]
    own += [at("shared codes", used, against=shared, more=pair) for used in (0, DEPTH)]
    return _against_whole(ablation, CHOICES) + _against_whole(ablation, RL_CHOICES, "rl") + ablation.rows(own)


def _against_whole(ablation: Ablation, others: Sequence[str], whole_arm: str = SLOW) -> Rows:
    cells = []
    for used in (0, DEPTH):
        whole = at(whole_arm, used)
        cells += [whole, *(at(variant, used, against=whole.model) for variant in others)]
    return ablation.rows(cells)


def pretraining(ablation: Ablation) -> Rows:
    """Stage 1 with similar items before the target, against a plain one: alone, and as what stage 2 starts from."""
    cells = [at("plain", 0), at("similar items", 0, against="plain")]
    for used in (0, DEPTH):
        whole = at(SLOW, used)
        cells += [whole, at("similar items, then stage 2", used, against=whole.model)]
    return ablation.rows(cells)


def times(ablation: Ablation) -> Rows:
    """A network that reads when events were, against the same without: by the beam, and by the dense score alone."""
    cells = []
    for way, dense in (("", False), (", state alone", True)):
        for variant, against in (("packed", ""), ("packed, with times", "packed" + way)):
            cells.append(Cell(variant + way, variant, Inference("test", 0), dense=dense, against=against))
    return ablation.rows(cells)


def rl(ablation: Ablation) -> Rows:
    """Stage 3 whole, and without any reward: its anchor alone, which is stage 2 gone on."""
    cells = []
    for used in (0, DEPTH):
        before = at(SLOW, used)
        cells += [before, at("rl", used, against=before.model), at("rl, anchor alone", used, against=before.model)]
    return ablation.rows(cells)


def rewards(ablation: Ablation) -> Rows:
    """Stage 3 with each reward taken out."""
    return _against_whole(ablation, [f"rl, no {name}" for name in REWARDS], "rl")


def prior(ablation: Ablation) -> Rows:
    """Reasoning that no label taught: by the answer's likelihood alone, then shaped by rewards."""
    cells = []
    for used in (0, DEPTH):
        taught, shaped = at(SLOW, used), at("rl", used)
        cells += [taught, at("no labels", used, against=taught.model)]
        cells += [shaped, at("rl, no labels", used, against=shaped.model)]
    return ablation.rows(cells)


def tokenizer(ablation: Ablation) -> Rows:
    """Semantic IDs by RQ-VAE, by chance with the same shape, and (where the data hold some) given ones."""
    ids = ("plain", "random ids", "given ids")
    return ablation.rows([at(variant, 0, against="plain") for variant in ids if ablation.permits(variant)])
