"""Rows about thinking: what it is made of, what it costs, when it pays, and what else a shop would join with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.accuracy import hits
from benchmarks.accuracy.arms import DEPTH, LENGTHS, OWN, SLOW
from benchmarks.accuracy.hits import Ask
from benchmarks.accuracy.lab import Cell, Lab, Rows, answer_ms, at, search_flops, training_flops
from benchmarks.accuracy.memory import MEMORY, TUNED
from serving.types import Merge
from training.metrics import ndcg
from training.stages.diagnostics import reasoning_diagnostics

PATHS = (1, 2, 4, 8)
UNION = 30
CANDIDATES = 50  # of the memory's best items join what the beam has found
PAYING = (SLOW, "state alone", "pause", "rl", "rl, anchor alone")
MEMORY_WEIGHTS = (1.0, 4.0, 10.0, 20.0, 40.0)


def steps(lab: Lab) -> Rows:
    """One checkpoint at every number of steps, and a checkpoint per number, each against its own answer without."""
    every = "every l"
    weight = lab.best_weight(every, 0)
    best = lab.choose([Cell(every, every, Ask("valid", length), weight) for length in LENGTHS])
    cells = [Cell("plain", "plain", Ask("test", 0), more={"kind": "plain"})]
    kinds = {0.0: "one checkpoint", weight: "one checkpoint, dense score joined"} if weight else {0.0: "one checkpoint"}
    for used, kind in kinds.items():
        for length in LENGTHS:
            more = {"kind": kind, "chosen": length == best.ask.steps and used == weight}
            name = f"{kind}, {length} steps"
            cells.append(Cell(name, every, Ask("test", length), used, f"{kind}, 0 steps", more=more))
    for length in OWN:
        for used in (0, length):
            name = f"trained for {length}"
            cells.append(Cell(f"{name}, {used} steps", f"l = {length}", Ask("test", used), 0.0, f"{name}, 0 steps",
                              more={"kind": "a checkpoint each", "trained_for": length}))  # fmt: skip
    return lab.rows(cells)


THOUGHTS = {
    "token and state": SLOW,
    "token alone": "token alone",
    "state alone": "state alone",
    "latent state": "latent",
    "pause tokens": "pause",
}


PAIRS = [
    *((f"{name}, {DEPTH} steps", f"{name}, 0 steps") for name in THOUGHTS),
    (f"token alone, {DEPTH} steps", f"pause tokens, {DEPTH} steps"),
    (f"token alone, {DEPTH} steps", f"random tokens, {DEPTH} steps, 1 paths"),
    (f"token alone, {DEPTH} steps", f"random tokens, {DEPTH} steps, 8 paths"),
    (f"token and state, {DEPTH} steps", f"state alone, {DEPTH} steps"),
]


def tokens(lab: Lab) -> Rows:
    """What the thoughts are made of, at the same number: beam alone, with the dense score joined, and pair by pair."""
    plain, no_thought = "plain, as costly", "state loss, no thinking"
    cells = [
        Cell(plain, plain, Ask("test", 0)),
        Cell(no_thought, "state loss alone", Ask("test", 0), against=plain),
    ]
    for name, arm in THOUGHTS.items():
        cells += [Cell(f"{name}, {used} steps", arm, Ask("test", used), against=plain) for used in (0, DEPTH)]
    cells.append(Cell("random tokens, 0 steps", "random", Ask("test", 0), against=plain))
    for draws in (1, 8):
        asked = Ask("test", DEPTH, draws=draws)
        cells.append(Cell(f"random tokens, {DEPTH} steps, {draws} paths", "random", asked, against=plain))
    rows = lab.rows([replace(cell, more={"part": "beam alone"}) for cell in cells])
    joined = [Cell(plain, plain, Ask("test", 0)), Cell(no_thought, "state loss alone", Ask("test", 0))]
    for name, arm in {no_thought: "state loss alone", **THOUGHTS}.items():
        weight = lab.best_weight(arm, 0) if arm != "latent" else 0.0  # a latent state was never taught to find items
        if weight:  # else validation would not have it joined
            for used in (0,) if name == no_thought else (0, DEPTH):
                joined.append(Cell(f"{name}, {used} steps, joined", arm, Ask("test", used), weight, plain))
    rows += lab.rows([replace(cell, more={"part": "joined"}) for cell in joined])[2:]
    named = {cell.model: replace(cell, more={"part": "pair"}) for cell in cells}
    return rows + [lab.row(named[one], named[other]) for one, other in PAIRS]


def compute(lab: Lab) -> Rows:
    """Against a plain model that went on from the same stage 1 at the training cost of stage 2."""
    plain = "plain, as costly"
    cells = [at("plain", 0, against=plain), at(plain, 0), at(SLOW, 0, against=plain), at(SLOW, DEPTH, against=plain)]
    return costed(lab, cells + [at("every l", length, against=plain) for length in (0, DEPTH, LENGTHS[-1])])


def grown(lab: Lab) -> Rows:
    """Against a plain model whose answer costs as much as the deepest thought does."""
    wide = "plain, grown"
    cells = [at(wide, 0), at("plain, as costly", 0, against=wide), at(SLOW, DEPTH, against=wide)]
    return costed(lab, [*cells, at("every l", LENGTHS[-1], against=wide)])


def costed(lab: Lab, cells: list[Cell]) -> Rows:
    rows = lab.rows(cells)
    for row, cell in zip(rows, cells, strict=True):
        work = lab.work(cell.arm, lab.seeds[0])
        spent = [
            training_flops(work, stage, work.config) * getattr(work.config, stage).steps
            for stage in ("pretrain", "sft")
            if getattr(work.config, stage).steps
        ]
        row["training_tflops"] = round(sum(spent) / 1e12, 1)
        row["answer_mflops"] = round(search_flops(work, cell.ask) / 1e6, 1)
        row["parameters"] = sum(parameter.numel() for parameter in work.network.t5.parameters())
    return rows


def paths(lab: Lab) -> Rows:
    """How many reasoning paths, and how an item reached by several is scored."""
    one, alone = f"{SLOW}: 1 path", "random: 1 path"
    cells = [Cell(one, SLOW, Ask("test", DEPTH))]
    merges: tuple[Merge, ...] = ("max", "logsumexp")
    for merge in merges:
        for count in PATHS[1:]:
            cells.append(Cell(f"{SLOW}: {count} paths, {merge}", SLOW, Ask("test", DEPTH, count, merge), against=one))
    cells.append(Cell(alone, "random", Ask("test", DEPTH, draws=1)))
    most = PATHS[-1]
    cells.append(Cell(f"random: {most} paths, max", "random", Ask("test", DEPTH, draws=most), against=alone))
    return lab.rows(cells)


def drift(lab: Lab) -> Rows:
    """Signs of failure on validation, with the model's own thoughts: per step, and what cannot be read as an item."""
    rows = []
    for arm, lengths in (("every l", LENGTHS), (SLOW, (0, DEPTH)), ("token alone", (0, DEPTH))):
        for length in lengths:
            found = []
            for seed in lab.seeds:
                work = lab.work(arm, seed)
                found.append(reasoning_diagnostics(work, *hits.users(work, "valid"), length))
            mean = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
            for step in range(length + 1):
                row = {"arm": arm, "steps": length, "step": step, "cosine": mean[f"cosine/{step}"]}
                row |= {"entropy": mean[f"entropy/{step}"]} if f"entropy/{step}" in mean else {}
                rows.append(row | {"unparsable": mean["unparsable"], "split": "valid"})
    return rows


def adaptive(lab: Lab) -> Rows:
    """Stops at the first number of steps whose last two states agree; the threshold's whole range is shown."""
    arm, found = "every l", {length: lab.hits("every l", Ask("test", length)) for length in LENGTHS}
    values = {length: np.mean([ndcg(one.rank(0.0)) for one in found[length]], 0) for length in LENGTHS}
    agree = {length: np.mean([one.settled[-1] for one in found[length]], 0) for length in LENGTHS[1:]}
    rows = [_policy(f"always {length}", np.full(len(values[0]), length), values) for length in LENGTHS]
    for threshold in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        length = np.full(len(values[0]), LENGTHS[-1])
        for shorter in reversed(LENGTHS[1:-1]):
            length = np.where(agree[shorter] >= threshold, shorter, length)
        rows.append(_policy(f"settled at {threshold}", length, values) | {"threshold": threshold})
    table = np.stack([values[length] for length in LENGTHS])
    hindsight = np.array(LENGTHS)[table.argmax(0)]
    rows.append(_policy("best per user, in hindsight", hindsight, values))
    for row in rows:
        row |= {"arm": arm, "split": "test"} | lab.gain(row.pop("values")[None], values[0][None])
    return rows


def _policy(name: str, length: np.ndarray, values: dict[int, np.ndarray]) -> dict[str, Any]:
    each = np.select([length == one for one in LENGTHS], [values[one] for one in LENGTHS])
    return {"model": name, "mean_steps": round(float(length.mean()), 2), "ndcg@10": round(float(each.mean()), 5),
            "values": each}  # fmt: skip


def joined(lab: Lab) -> Rows:
    """The beam's score, the dense score, both on what the beam found, and both over the union with the dense best."""
    cells = []
    for arm, used in ((SLOW, 0), (SLOW, DEPTH), ("state loss alone", 0)):
        weights = [weight for weight in lab.config(arm).evaluation.dense_weights if weight]
        lab.best_weight(arm, used)  # puts down whether validation would join at all
        weight = lab.choose([Cell(arm, arm, Ask("valid", used), weight) for weight in weights]).weight
        united = Ask("test", used, union=UNION, union_weight=weight)  # at the weight that the found items chose
        name = f"{arm}, {used} steps"
        beam = f"{name}: beam"
        cells += [
            Cell(beam, arm, Ask("test", used)),
            Cell(f"{name}: dense alone", arm, Ask("test", used), against=beam, dense=True),
            Cell(f"{name}: joined on what the beam found", arm, Ask("test", used), weight, beam),
            Cell(f"{name}: joined over the union", arm, united, weight, beam),
        ]
    return lab.rows(cells)


def deployed(lab: Lab) -> Rows:
    """What a shop would run, the memory of log and texts joined in at the weight that validation likes best, beside
    tuned neighbours; and what the network and its thoughts add to that memory."""
    tuned, memory = Cell(TUNED, TUNED, Ask("test", 0)), Cell(MEMORY, MEMORY, Ask("test", 0), against=TUNED)
    joined = []
    for arm, used in (("plain", 0), (SLOW, 0), (SLOW, DEPTH)):
        ask = Ask("valid", used, union=CANDIDATES)
        best = lab.choose([Cell(arm, arm, replace(ask, memory=weight)) for weight in MEMORY_WEIGHTS]).ask.memory
        name = f"{at(arm, used).model}, and memory"
        joined.append(Cell(name, arm, replace(ask, split="test", memory=best), against=TUNED))
    _, without, thinking = joined
    pairs = [*((cell, memory) for cell in joined), (thinking, without)]
    rows = lab.rows([tuned, memory, *joined])
    return rows + [lab.row(replace(cell, more={"part": "pair"}), other) for cell, other in pairs]


def pays(lab: Lab) -> Rows:
    """All controls in one table: each way of thinking against plain training as costly as stage 2, stage 3 also against
    its anchor alone, thinking against not thinking, and what a shop would run against tuned neighbours."""
    plain, anchor = "plain, as costly", "rl, anchor alone"
    cells = [at("plain", 0, against=plain), at(plain, 0)]
    for arm in PAYING:
        weight = lab.best_weight(arm, DEPTH)
        cells += [at(arm, used, against=plain) for used in (0, DEPTH)]
        if weight:  # else validation would not have the dense score joined
            name = f"{arm}, {DEPTH} steps, dense score joined"
            cells.append(Cell(name, arm, Ask("test", DEPTH), weight, plain))
    pairs = [
        *((at(arm, DEPTH), at(arm, 0)) for arm in PAYING),
        *((at("rl", used), at(anchor, used)) for used in (0, DEPTH)),
    ]
    alone = [lab.row(replace(one, more={"part": "pair"}), other) for one, other in pairs]
    return lab.rows(cells) + alone + deployed(lab)


def groups(lab: Lab) -> Rows:
    """Who gains from thinking: by how often the target was bought, and by the length of the history."""
    work = lab.work(SLOW, lab.seeds[0])
    bought = np.bincount(np.concatenate(work.split.train), minlength=len(work.item_tokens))[work.split.test_target]
    length = np.array([len(history) for history in work.split.test_history])
    cells = []
    for about, value in (("target bought", bought), ("history of", length)):
        edges = [0, *sorted({int(edge) for edge in np.quantile(value, (1 / 3, 2 / 3))}), int(value.max())]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            chosen = np.flatnonzero((value > low if low else value >= 0) & (value <= high))
            group = f"{about} {low + 1 if low else int(value.min())} to {high}"
            for arm, used in ((SLOW, DEPTH), ("every l", LENGTHS[-1])):
                before = f"{arm}, 0 steps, {group}"
                for thought in (0, used):
                    name = f"{arm}, {thought} steps, {group}"
                    asked, more = Ask("test", thought), {"group": group}
                    cells.append(Cell(name, arm, asked, against=before, users=chosen, more=more))
    return [row for row in lab.rows(cells) if row["steps"]]


def small(lab: Lab) -> Rows:
    """Fewer steps by distillation, fewer bits by int8: accuracy, time and FLOPs of an answer beside each other."""
    whole = f"{SLOW}, 0 steps, float32"
    cells = [
        Cell(f"{arm}, {used} steps, {'int8' if int8 else 'float32'}", arm, Ask("test", used, int8=int8), against=whole)
        for arm, int8 in ((SLOW, False), (SLOW, True), ("distilled", False))
        for used in (0, DEPTH)
    ]
    rows = lab.rows(cells)
    for row, cell in zip(rows, cells, strict=True):
        work = lab.work(cell.arm, lab.seeds[0])
        row["weights"] = "int8" if cell.ask.int8 else "float32"
        row["answer_mflops"] = round(search_flops(work, cell.ask) / 1e6, 1)
        row["answer_ms"] = round(answer_ms(work, cell.ask), 2)
    return rows
