"""Compares looking back with what it must beat: the recent history alone, a longer one encoded at once, older items
that no state has chosen or that are another user's, and steps that read nothing."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from benchmarks.accuracy import both_rules
from benchmarks.accuracy.both_rules import Rows
from benchmarks.accuracy.look_back import older_items
from benchmarks.accuracy.proposals import BEAM, propose
from benchmarks.accuracy.ranks import gain_over
from benchmarks.accuracy.train_back import ARMS, LOOK, Form, Parts, Readers, ndcg_of, train_arm
from benchmarks.accuracy.views import Lists
from benchmarks.accuracy.walk_inputs import Inputs, Walkers
from serving.network.model import dense_logits
from training.join import GATED, Proposals, fit_gate

CHOOSE = 3  # one of so many validation users chooses, the others are learnt from
AT_ONCE = (30, 60, 100)  # items
RECENT, LONGER = "l = 0", "longer history at once, l = 0"
COLUMNS = ("model", "form", "memory", "excluded", "valid", "recall@10", "ndcg@10", "gain", "low", "high", "percent",
           "against")  # fmt: skip
PROTOCOL = (
    "Leave-one-out, test, full ranking, users with more events than the network reads, for the others have nothing to "
    "look back at; every row once with and once without the items of the history excluded. The network is converged, "
    "reads the last 20 items and stays as it is; a state answers by its dense score. memory: mixed with the item "
    "memory through the gate of training/join.py, fitted on validation users by features of what is mixed. A third of "
    "the validation users, without those that chose the network's weights, choose an arm's epoch and each model's form "
    "by NDCG@10 (`valid`) and fit the gates; the arms learn from the other two thirds. gain: of test NDCG@10 against "
    "the row named in `against`, with a 95% interval by paired bootstrap over users."
)


@torch.inference_mode()
def proposals_of(state: torch.Tensor, users: Walkers, vectors: torch.Tensor) -> Proposals:
    """The best by the dense score and the best of the item memory. Shapes as in `ndcg_of`."""
    barred = users.begin(np.arange(len(state)), len(vectors)).barred
    scores = dense_logits(state, vectors).masked_fill(barred, -torch.inf)
    best = scores.log_softmax(1).topk(min(BEAM, len(vectors)))
    lists = Lists(best.indices.numpy(), best.values.numpy())
    return propose(users, lambda begin: [begin.slots.dense(len(vectors))], lists, len(vectors))[0]


def rows_of(inputs: Inputs, models: dict[str, list[Form]], parts: Parts) -> Rows:
    """The test's rows by one rule, of the states alone and mixed with the memory."""
    rows: Rows = []
    vectors = inputs.vectors
    scores = {
        name: [ndcg_of(form.valid, parts.valid.users, vectors).mean() for form in forms]
        for name, forms in models.items()
    }
    for mixed in (False, True):
        found: dict[str, np.ndarray] = {}
        for name, forms in models.items():
            chosen = int(np.argmax(scores[name]))
            for number, form in enumerate(forms):
                if number != chosen and (name != LOOK or mixed):
                    continue
                own = _mixed(form, parts, vectors) if mixed else ndcg_of(form.test, parts.test.users, vectors)
                if number == chosen:
                    found[name] = own
                row = {"model": name, "form": form.name, "chosen": number == chosen, "memory": mixed,
                       "excluded": inputs.excluded, "users": len(own), "valid": round(float(scores[name][number]), 5),
                       "recall@10": round(float((own > 0).mean()), 5),
                       "ndcg@10": round(float(own.mean()), 5)}  # fmt: skip
                rows.append(row if name == RECENT else row | {"against": RECENT} | gain_over(own, found[RECENT]))
        if LOOK in found:
            head = next(row for row in rows if row["model"] == LOOK and row["memory"] == mixed and row["chosen"])
            for other in [name for name in found if name not in (RECENT, LOOK)]:
                rows.append(head | {"against": other} | gain_over(found[LOOK], found[other]))
    return rows


def _mixed(form: Form, parts: Parts, vectors: torch.Tensor) -> np.ndarray:
    gate = fit_gate(proposals_of(form.valid, parts.valid.users, vectors), GATED)
    return proposals_of(form.test, parts.test.users, vectors).ndcg(gate)


def compared(inputs: Inputs, seed: int) -> tuple[Rows, Rows]:
    """Rows by one rule, and the checks of the arms: one that does not act has no rows."""
    work = inputs.work
    few = work.config.evaluation.model_copy(update={"choice_users": len(work.split.valid_target) // CHOOSE})
    config = work.config.model_copy(update={"evaluation": few})
    inputs = replace(inputs, work=replace(work, config=config))
    valid, newest = inputs.users("valid"), config.model.max_items
    # The first of them chose the network's weights, which are the best for them by chance too.
    choose = valid.of(np.arange(config.evaluation.valid_users, len(valid.target)))
    drawn = _permitted(inputs.held_out), choose, inputs.users("test")
    parts = Parts(*(_with_older(users, newest) for users in drawn))
    valid, test = parts.valid.users, parts.test.users
    models = {RECENT: [Form(f"{newest} items", valid.state, test.state)], LONGER: []}
    for items in AT_ONCE:
        states = (inputs.states(part, of.histories, items) for part, of in (("valid", valid), ("test", test)))
        models[LONGER].append(Form(f"{items} items", *states))
    checks = []
    for name in ARMS:
        forms, check = train_arm(name, inputs, parts, seed)
        checks.append(check)
        if check["acts"]:
            models[name] = forms
    return rows_of(inputs, models, parts), checks


def _with_older(users: Walkers, newest: int) -> Readers:
    """Those with something to look back at."""
    chosen = users.of(np.flatnonzero([len(history) > newest for history in users.histories]))
    return Readers(chosen, older_items(chosen.histories, newest))


def _permitted(users: Walkers) -> Walkers:
    """Those whose target the rule permits."""
    seen = [target in history for target, history in zip(users.target.tolist(), users.histories, strict=True)]
    return users.of(np.flatnonzero(~np.array(seen))) if users.excluded else users


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    return both_rules.answer(options, command, compared, COLUMNS, PROTOCOL)
