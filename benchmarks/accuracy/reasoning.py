"""Rows about reasoning: what it is made of, what it costs, when it pays, and what a shop would join with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.accuracy.ablation import Ablation, Cell, Rows, at
from benchmarks.accuracy.costs import answer_ms, search_flops, training_flops
from benchmarks.accuracy.item_graph import PARTS, TUNED
from benchmarks.accuracy.ranks import Inference, evaluation_users, gain_over
from benchmarks.accuracy.variants import DEPTH, OWN, SLOW
from serving.types import Merge
from training.metrics import ndcg
from training.stages.diagnostics import reasoning_diagnostics

PATHS = (1, 2, 4, 8)
UNION = 30
PAYING = (SLOW, "state alone", "pause", "rl", "rl, anchor alone")


def steps(ablation: Ablation) -> Rows:
    """One checkpoint at every number of steps, and a checkpoint per number, each against its own answer without."""
    every, lengths = "every l", ablation.lengths()
    weight = ablation.best_weight(every, 0)
    best = ablation.choose([Cell(every, every, Inference("valid", length), weight) for length in lengths])
    cells = [Cell("plain", "plain", Inference("test", 0), more={"kind": "plain"})]
    kinds = {0.0: "one checkpoint", weight: "one checkpoint, dense score joined"} if weight else {0.0: "one checkpoint"}
    for used, kind in kinds.items():
        for length in lengths:
            more = {"kind": kind, "chosen": length == best.inference.steps and used == weight}
            name = f"{kind}, {length} steps"
            cells.append(Cell(name, every, Inference("test", length), used, f"{kind}, 0 steps", more=more))
    for length in ablation.lengths(OWN):
        for used in (0, length):
            name, more = f"trained for {length}", {"kind": "a checkpoint each", "trained_for": length}
            inference, against = Inference("test", used), f"{name}, 0 steps"
            cells.append(Cell(f"{name}, {used} steps", f"l = {length}", inference, against=against, more=more))
    return ablation.rows(cells)


REASONING = {
    "token and state": SLOW,
    "token alone": "token alone",
    "state alone": "state alone",
    "latent state": "latent",
    "pause tokens": "pause",
}


PAIRS = [
    *((f"{name}, {DEPTH} steps", f"{name}, 0 steps") for name in REASONING),
    (f"token alone, {DEPTH} steps", f"pause tokens, {DEPTH} steps"),
    (f"token alone, {DEPTH} steps", f"random tokens, {DEPTH} steps, 1 paths"),
    (f"token alone, {DEPTH} steps", f"random tokens, {DEPTH} steps, 8 paths"),
    (f"token and state, {DEPTH} steps", f"state alone, {DEPTH} steps"),
]


def tokens(ablation: Ablation) -> Rows:
    """What steps are made of, at the same number: beam alone, with the dense score joined, and pair by pair."""
    plain, no_reasoning = "plain, as costly", "state loss, no reasoning"
    cells = [
        Cell(plain, plain, Inference("test", 0)),
        Cell(no_reasoning, "state loss alone", Inference("test", 0), against=plain),
    ]
    for name, variant in REASONING.items():
        cells += [Cell(f"{name}, {used} steps", variant, Inference("test", used), against=plain) for used in (0, DEPTH)]
    cells.append(Cell("random tokens, 0 steps", "random", Inference("test", 0), against=plain))
    for draws in (1, 8):
        inference = Inference("test", DEPTH, draws=draws)
        cells.append(Cell(f"random tokens, {DEPTH} steps, {draws} paths", "random", inference, against=plain))
    rows = ablation.rows([replace(cell, more={"part": "beam alone"}) for cell in cells])
    joined = [Cell(plain, plain, Inference("test", 0)), Cell(no_reasoning, "state loss alone", Inference("test", 0))]
    for name, variant in {no_reasoning: "state loss alone", **REASONING}.items():
        weight = (
            ablation.best_weight(variant, 0) if variant != "latent" else 0.0
        )  # a latent state was never taught to find items
        if weight:  # else validation would not have it joined
            for used in (0,) if name == no_reasoning else (0, DEPTH):
                joined.append(Cell(f"{name}, {used} steps, joined", variant, Inference("test", used), weight, plain))
    rows += ablation.rows([replace(cell, more={"part": "joined"}) for cell in joined])[2:]
    named = {cell.model: replace(cell, more={"part": "pair"}) for cell in cells}
    return rows + [ablation.row(named[one], named[other]) for one, other in PAIRS]


def compute(ablation: Ablation) -> Rows:
    """Against a plain model that went on from the same stage 1 at the training cost of stage 2."""
    plain = "plain, as costly"
    cells = [at("plain", 0, against=plain), at(plain, 0), at(SLOW, 0, against=plain), at(SLOW, DEPTH, against=plain)]
    lengths = sorted({0, DEPTH, ablation.lengths()[-1]})
    return costed(ablation, cells + [at("every l", length, against=plain) for length in lengths])


def grown(ablation: Ablation) -> Rows:
    """Against a plain model whose answer costs as much as the deepest reasoning does."""
    wide = "plain, grown"
    cells = [at(wide, 0), at("plain, as costly", 0, against=wide), at(SLOW, DEPTH, against=wide)]
    return costed(ablation, [*cells, at("every l", ablation.lengths()[-1], against=wide)])


def costed(ablation: Ablation, cells: list[Cell]) -> Rows:
    rows = ablation.rows(cells)
    for row, cell in zip(rows, cells, strict=True):
        work = ablation.work(cell.variant, ablation.seeds[0])
        spent = [
            training_flops(work, stage, work.config) * getattr(work.config, stage).steps
            for stage in ("pretrain", "sft")
            if getattr(work.config, stage).steps
        ]
        row["training_tflops"] = round(sum(spent) / 1e12, 1)
        row["answer_mflops"] = round(search_flops(work, cell.inference) / 1e6, 1)
        row["parameters"] = sum(parameter.numel() for parameter in work.network.t5.parameters())
    return rows


def paths(ablation: Ablation) -> Rows:
    """How many reasoning paths, and how an item reached by several is scored."""
    one, alone = f"{SLOW}: 1 path", "random: 1 path"
    cells = [Cell(one, SLOW, Inference("test", DEPTH))]
    merges: tuple[Merge, ...] = ("max", "logsumexp")
    for merge in merges:
        for count in PATHS[1:]:
            cells.append(
                Cell(f"{SLOW}: {count} paths, {merge}", SLOW, Inference("test", DEPTH, count, merge), against=one)
            )
    cells.append(Cell(alone, "random", Inference("test", DEPTH, draws=1)))
    most = PATHS[-1]
    cells.append(Cell(f"random: {most} paths, max", "random", Inference("test", DEPTH, draws=most), against=alone))
    return ablation.rows(cells)


def drift(ablation: Ablation) -> Rows:
    """How reasoning fails, on validation and with the model's own tokens: per step, and outputs that are no item."""
    rows = []
    for variant, lengths in (("every l", ablation.lengths()), (SLOW, (0, DEPTH)), ("token alone", (0, DEPTH))):
        for length in lengths:
            found = []
            for seed in ablation.seeds:
                work = ablation.work(variant, seed)
                found.append(reasoning_diagnostics(work, *evaluation_users(work, "valid"), length))
            mean = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
            for step in range(length + 1):
                row = {"arm": variant, "steps": length, "step": step, "cosine": mean[f"cosine/{step}"]}
                row |= {"entropy": mean[f"entropy/{step}"]} if f"entropy/{step}" in mean else {}
                rows.append(row | {"unparsable": mean["unparsable"], "split": "valid"})
    return rows


def adaptive(ablation: Ablation) -> Rows:
    """Stops at the first number of steps whose last two states agree; the threshold's whole range is shown."""
    variant, lengths = "every l", ablation.lengths()
    found = {length: ablation.target_ranks(variant, Inference("test", length)) for length in lengths}
    values = {length: np.mean([ndcg(one.rank(0.0)) for one in found[length]], 0) for length in lengths}
    agree = {length: np.mean([one.settled[-1] for one in found[length]], 0) for length in lengths[1:]}
    rows = [_policy(f"always {length}", np.full(len(values[0]), length), values) for length in lengths]
    for threshold in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        length = np.full(len(values[0]), lengths[-1])
        for shorter in reversed(lengths[1:-1]):
            length = np.where(agree[shorter] >= threshold, shorter, length)
        rows.append(_policy(f"settled at {threshold}", length, values) | {"threshold": threshold})
    table = np.stack([values[length] for length in lengths])
    hindsight = np.array(lengths)[table.argmax(0)]
    rows.append(_policy("best per user, in hindsight", hindsight, values))
    for row in rows:
        row |= {"arm": variant, "split": "test"} | gain_over(row.pop("values"), values[0])
    return rows


def _policy(name: str, length: np.ndarray, values: dict[int, np.ndarray]) -> dict[str, Any]:
    each = np.select([length == one for one in values], list(values.values()))
    return {"model": name, "mean_steps": round(float(length.mean()), 2), "ndcg@10": round(float(each.mean()), 5),
            "values": each}  # fmt: skip


def joined(ablation: Ablation) -> Rows:
    """The beam's score, the dense score, both on what the beam found, and both over the union with the dense best."""
    cells = []
    for variant, used in ((SLOW, 0), (SLOW, DEPTH), ("state loss alone", 0)):
        weights = [weight for weight in ablation.config(variant).evaluation.dense_weights if weight]
        ablation.best_weight(variant, used)  # records whether validation would join at all
        weight = ablation.choose(
            [Cell(variant, variant, Inference("valid", used), weight) for weight in weights]
        ).weight
        united = Inference("test", used, union=UNION, union_weight=weight)  # at the weight that the found items chose
        name = f"{variant}, {used} steps"
        beam = f"{name}: beam"
        cells += [
            Cell(beam, variant, Inference("test", used)),
            Cell(f"{name}: dense alone", variant, Inference("test", used), against=beam, dense=True),
            Cell(f"{name}: joined on what the beam found", variant, Inference("test", used), weight, beam),
            Cell(f"{name}: joined over the union", variant, united, weight, beam),
        ]
    return ablation.rows(cells)


def deployed(ablation: Ablation) -> Rows:
    """What a shop would run: the network mixed with the item memory through the gate that validation fits, compared
    with tuned neighbours; each part of the memory, memory and network alone, and what each adds to the other."""
    tuned = Cell(TUNED, TUNED, Inference("test", 0))
    parts = [Cell(name, name, Inference("test", 0), against=TUNED) for name in PARTS]
    memory, alone, mixed = parts[-1], [], []
    for variant, used in (("plain", 0), (SLOW, 0), (SLOW, DEPTH)):
        network = at(variant, used, against=TUNED)
        report = ablation.join(variant, ablation.seeds[0]).report
        alone.append(network)
        name, how = f"{network.model}, and memory", {"way": report["way"], "gate": report["gate"]}
        mixed.append(Cell(name, variant, Inference("test", used, mixed=True), against=TUNED, more=how))
        ablation.validation.append({"model": network.model, "split": "valid", **report})
    _, without, reasoned = mixed
    pairs = [
        *((cell, memory) for cell in mixed),
        *zip(mixed, alone, strict=True),
        (reasoned, without),
    ]
    rows = ablation.rows([tuned, *parts, *alone, *mixed])
    return rows + [ablation.row(replace(cell, more=cell.more | {"part": "pair"}), other) for cell, other in pairs]


def pays(ablation: Ablation) -> Rows:
    """All controls in one table: each form of reasoning against plain training as costly as stage 2, stage 3 also
    against its anchor alone, steps against no steps, and what a shop would run against tuned neighbours."""
    plain, anchor = "plain, as costly", "rl, anchor alone"
    cells = [at("plain", 0, against=plain), at(plain, 0)]
    for variant in PAYING:
        weight = ablation.best_weight(variant, DEPTH)
        cells += [at(variant, used, against=plain) for used in (0, DEPTH)]
        if weight:  # else validation would not have the dense score joined
            name = f"{variant}, {DEPTH} steps, dense score joined"
            cells.append(Cell(name, variant, Inference("test", DEPTH), weight, plain))
    pairs = [
        *((at(variant, DEPTH), at(variant, 0)) for variant in PAYING),
        *((at("rl", used), at(anchor, used)) for used in (0, DEPTH)),
    ]
    alone = [ablation.row(replace(one, more={"part": "pair"}), other) for one, other in pairs]
    return ablation.rows(cells) + alone + deployed(ablation)


def groups(ablation: Ablation) -> Rows:
    """Who gains from reasoning: by how often the target was bought, and by the length of the history."""
    work = ablation.work(SLOW, ablation.seeds[0])
    bought = np.bincount(np.concatenate(work.split.train), minlength=len(work.item_tokens))[work.split.test_target]
    length = np.array([len(history) for history in work.split.test_history])
    cells = []
    for about, value in (("target bought", bought), ("history of", length)):
        edges = [0, *sorted({int(edge) for edge in np.quantile(value, (1 / 3, 2 / 3))}), int(value.max())]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            chosen = np.flatnonzero((value > low if low else value >= 0) & (value <= high))
            group = f"{about} {low + 1 if low else int(value.min())} to {high}"
            for variant, used in ((SLOW, DEPTH), ("every l", ablation.lengths()[-1])):
                before = f"{variant}, 0 steps, {group}"
                for count in (0, used):
                    name = f"{variant}, {count} steps, {group}"
                    inference, more = Inference("test", count), {"group": group}
                    cells.append(Cell(name, variant, inference, against=before, users=chosen, more=more))
    return [row for row in ablation.rows(cells) if row["steps"]]


def compression(ablation: Ablation) -> Rows:
    """Fewer steps by distillation, fewer bits by int8: accuracy, time and FLOPs of an answer."""
    whole = f"{SLOW}, 0 steps, float32"
    cells = [
        Cell(
            f"{variant}, {used} steps, {'int8' if int8 else 'float32'}",
            variant,
            Inference("test", used, int8=int8),
            against=whole,
        )
        for variant, int8 in ((SLOW, False), (SLOW, True), ("distilled", False))
        for used in (0, DEPTH)
    ]
    rows, works = ablation.rows(cells), [ablation.work(cell.variant, ablation.seeds[0]) for cell in cells]
    spent = answer_ms([(work, cell.inference) for work, cell in zip(works, cells, strict=True)])
    for row, cell, work, ms in zip(rows, cells, works, spent, strict=True):
        row["weights"] = "int8" if cell.inference.int8 else "float32"
        row["answer_mflops"] = round(search_flops(work, cell.inference) / 1e6, 1)
        row["answer_ms"] = round(ms, 2)
    return rows
