"""Compares the pointer walk with what it must beat: the memory joined once, a fixed second hop, and steps that do not
read, or read something else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse

from benchmarks.accuracy import both_rules
from benchmarks.accuracy.both_rules import Rows
from benchmarks.accuracy.pointer_walk import Begin, Graph
from benchmarks.accuracy.proposals import BEAM, propose
from benchmarks.accuracy.ranks import gain_over
from benchmarks.accuracy.train_walk import ARMS, WALK, reads_of, train_arm, validation_ndcg
from benchmarks.accuracy.walk_inputs import Inputs, Read, Walkers
from training.join import GATED, fit_gate

ONCE, TWO_HOPS = "memory, l = 0", "memory with a second hop, l = 0"
HOPS = (0.03, 0.1, 0.3, 1.0)  # weights of the second hop
COLUMNS = ("model", "form", "excluded", "valid", "recall@10", "ndcg@10", "gain", "low", "high", "percent",
           "against")  # fmt: skip
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items; every row once with and once without the items of the "
    "history excluded, each with a memory, walks and gates of its own. The network is converged and stays as it is. "
    "Every model is mixed with it through the gate of training/join.py, fitted on validation users by features of what "
    "is mixed. P of the network is that of a beam of 50, and nothing beyond it. "
    "valid: NDCG@10 of validation users at a fixed mixture, which chose a walk's epoch and each model's form; rows of "
    "the walk show all its forms. gain: of test NDCG@10 against the row named in `against`, with a 95% interval by "
    "paired bootstrap over users."
)


def second_hop(graph: Graph, items: int) -> Read:
    """All slots bring their neighbours once, at each of several weights."""
    rows = np.repeat(np.arange(items), graph.items.shape[1])
    weights = graph.log_weight.exp().flatten().numpy()
    into = sparse.csr_matrix((weights, (graph.items.flatten().numpy(), rows)), shape=(items, items))

    def read(begin: Begin) -> list[torch.Tensor]:
        once = begin.slots.dense(items)
        twice = torch.from_numpy((into @ once.numpy().T).T).masked_fill(begin.barred, 0)
        return [(once + hop * twice) / (1 + hop) for hop in HOPS]

    return read


def rows_of(inputs: Inputs, reads: dict[str, tuple[Read, list[str]]], parts: dict[str, Walkers]) -> Rows:
    """The test's rows by one rule. reads: of each model, with the names of its forms."""
    lists, items = {part: inputs.lists(part, BEAM) for part in parts}, len(inputs.vectors)
    found: dict[str, np.ndarray] = {}
    rows: Rows = []
    for name, (read, forms) in reads.items():
        scores = validation_ndcg(read, parts["valid"], inputs.vectors)
        chosen = int(np.argmax(scores))
        shown = range(len(forms)) if name == WALK else [chosen]
        some = _some(read, shown)
        to_fit, to_judge = (propose(users, some, lists[part], items) for part, users in parts.items())
        for form, fitted, judged in zip(shown, to_fit, to_judge, strict=True):
            own = judged.ndcg(fit_gate(fitted, GATED))
            if form == chosen:
                found[name] = own
            row = {"model": name, "form": forms[form], "chosen": form == chosen, "excluded": inputs.excluded,
                   "users": len(own), "valid": round(float(scores[form]), 5),
                   "recall@10": round(float((own > 0).mean()), 5), "ndcg@10": round(float(own.mean()), 5)}  # fmt: skip
            against = {ONCE: None, TWO_HOPS: ONCE}.get(name, TWO_HOPS)
            rows.append(row if against is None else row | {"against": against} | gain_over(own, found[against]))
    if WALK in found:
        head = next(row for row in rows if row["model"] == WALK and row["chosen"])
        for other in [name for name in found if name not in (TWO_HOPS, WALK)]:
            rows.append(head | {"against": other} | gain_over(found[WALK], found[other]))
    return rows


def _some(read: Read, forms: Sequence[int]) -> Read:
    def some(begin: Begin) -> list[torch.Tensor]:
        found = read(begin)
        return [found[form] for form in forms]

    return some


def compared(inputs: Inputs, seed: int) -> tuple[Rows, Rows]:
    """Rows by one rule, and the checks of the arms: one that does not act has no rows."""
    items, parts = len(inputs.vectors), {part: inputs.users(part) for part in ("valid", "test")}
    reads: dict[str, tuple[Read, list[str]]] = {
        ONCE: (lambda begin: [begin.slots.dense(items)], ["share"]),
        TWO_HOPS: (second_hop(Graph.of(inputs.memory.whole), items), [f"weight {hop:g}" for hop in HOPS]),
    }
    checks = []
    for name, arm in ARMS.items():
        walk, check = train_arm(name, inputs, parts["valid"], seed)
        checks.append(check)
        if check["acts"]:
            reads[name] = reads_of(walk, arm.steps), [f"l = {step}" for step in range(1, arm.steps + 1)]
    return rows_of(inputs, reads, parts), checks


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    return both_rules.answer(options, command, compared, COLUMNS, PROTOCOL)
