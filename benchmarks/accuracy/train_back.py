"""Trains what looks back, on what a frozen network knows of users, and checks that what was trained acts.

    L = mean over s_1 .. s_l of -log P(target),    P = softmax of p times the dense score

One pass serves every number of steps, for a step does not know how many follow. [open: all of it.]
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.accuracy import small_modules
from benchmarks.accuracy.look_back import OLDER, Kind, LookBack
from benchmarks.accuracy.walk_inputs import Inputs, Walkers
from serving.network.model import dense_logits
from training.join import LEAST_LOG
from training.metrics import ndcg

STEPS, RATE, DROPOUT = 4, 3e-4, 0.2
LEAST_EFFECT = 1e-3  # of another user's state on the first read (total variation), for the read to be the user's own
LOOK = "look back"


class Readers(NamedTuple):
    """older: what the network does not read of the users' histories, (U, OLDER) int64 as of `older_items`."""

    users: Walkers
    older: torch.Tensor


class Parts(NamedTuple):
    """learn: validation users that choose nothing. valid: those that choose."""

    learn: Readers
    valid: Readers
    test: Readers


@dataclass(frozen=True, slots=True)
class Arm:
    """others: reads the older items of another user. steps: the most it takes."""

    kind: Kind = Kind()
    others: bool = False
    steps: int = STEPS

    def older(self, readers: Readers) -> torch.Tensor:
        return readers.older.roll(1, 0) if self.others else readers.older


ARMS = {
    LOOK: Arm(),
    "one read of all": Arm(Kind(fetched=OLDER), steps=1),
    "newest first": Arm(Kind(queries=False)),
    "all, equally": Arm(Kind(queries=False, fetched=OLDER), steps=1),
    "another user's past": Arm(others=True),
    "pauses": Arm(Kind(fetched=0)),
}


class Form(NamedTuple):
    """A model's states of the users that choose and of the test's. Shape of each: (U, D)."""

    name: str
    valid: torch.Tensor
    test: torch.Tensor


def train_arm(name: str, inputs: Inputs, parts: Parts, seed: int) -> tuple[list[Form], dict[str, Any]]:
    """What an arm makes of the users after each step, and what its check says; kept under the inputs' folder."""
    arm, began = ARMS[name], time.perf_counter()
    torch.manual_seed(seed)
    look = LookBack(inputs.vectors, arm.kind)

    def train() -> dict[str, Any]:
        report = _train(look, arm, parts, seed)
        return report | {"minutes": round((time.perf_counter() - began) / 60, 2)}

    file = inputs.folder / f"{name}-seed-{seed}-excluded-{inputs.excluded}.safetensors"
    row = {"model": name, "excluded": inputs.excluded, **small_modules.keep(look, file, train)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    valid, test = (states_of(look, arm, part) for part in (parts.valid, parts.test))
    return [Form(f"l = {step + 1}", valid[step], test[step]) for step in range(arm.steps)], row


def _train(look: LookBack, arm: Arm, parts: Parts, seed: int) -> dict[str, Any]:
    learn, older = parts.learn.users, arm.older(parts.learn)

    def batch_loss(index: np.ndarray) -> torch.Tensor:
        """The mean over steps of -log P(target)."""
        begin = learn.begin(index, len(look.vectors))
        states = look(F.dropout(begin.state, DROPOUT), older[index], arm.steps)
        logits = (look.power * dense_logits(states, look.vectors)).masked_fill(begin.barred, LEAST_LOG)
        return F.cross_entropy(logits.flatten(0, 1), learn.target[index].repeat(arm.steps))

    def score() -> float:
        states = states_of(look, arm, parts.valid)
        return float(np.mean([ndcg_of(state, parts.valid.users, look.vectors).mean() for state in states]))

    watched = look.query.weight if arm.kind.queries and arm.kind.fetched else look.out.weight
    scores, gradient = small_modules.fit(look, batch_loss, len(older), score, RATE, seed, watched)
    effect, best_epoch = state_effect(look, arm, parts.valid), int(np.argmax(scores))
    chooses = arm.kind.queries and arm.kind.fetched > 0
    return {
        "gradient": float(f"{gradient:.3g}"),
        "query": round(float(look.query.weight.detach().norm()), 4),
        "scale": round(float(look.scale.detach()), 4),
        "power": round(float(look.power.detach()), 3),
        "direct": round(float(look.direct.detach()), 4),
        "out": round(float(look.out.weight.detach().norm()), 4),
        "state_effect": round(effect, 4),
        "best_epoch": best_epoch,
        "valid": [round(score, 5) for score in scores],
        "acts": best_epoch > 0 and gradient > 0 and (effect > LEAST_EFFECT or not chooses),
    }


@torch.inference_mode()
def states_of(look: LookBack, arm: Arm, readers: Readers) -> torch.Tensor:
    """Shape: (steps, U, D)."""
    users, older = readers.users, arm.older(readers)
    return torch.cat([look(users.state[index], older[index], arm.steps) for index in users.batches()], 1)


@torch.inference_mode()
def state_effect(look: LookBack, arm: Arm, readers: Readers) -> float:
    """How much of the first read changes when another user's state chooses it: the total variation, 0..1."""
    state, older = readers.users.state, arm.older(readers)
    vectors, unread = F.embedding(older.clamp(min=0), look.vectors), older >= 0
    own, others = (look.fetch(each, vectors, unread)[0] for each in (state, state.roll(1, 0)))
    return float((own - others).abs().sum(1).mean() / 2)


@torch.inference_mode()
def ndcg_of(state: torch.Tensor, users: Walkers, vectors: torch.Tensor) -> np.ndarray:
    """NDCG@10 by the dense score. An equal score ranks ahead of the target. Shapes: (U, D), (I, D) -> (U,)."""
    found = []
    for index in users.batches():
        scores = dense_logits(state[index], vectors).masked_fill(users.begin(index, len(vectors)).barred, -torch.inf)
        own = scores.gather(1, users.target[index, None])
        found.append(ndcg(((scores >= own).sum(1) - 1).numpy()))
    return np.concatenate(found)
