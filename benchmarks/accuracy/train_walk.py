"""Trains walks on what a frozen network and its item memory know of users, and checks that what was trained acts.

    P = NETWORK * P_network + (1 - NETWORK) * a_i,    L = mean over a_1 .. a_l of -log P(target), or 1 - P(target)

One pass serves every number of steps, for a step does not know how many follow. P_network is the dense score of s_0.
The likelihood is decided by targets that no list of ten holds, 1 - P(target) by those that may be among its first.
[open: all of it. The gate that mixes what is measured is fitted on validation, see `compare_walk.py`.]
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.accuracy import small_modules
from benchmarks.accuracy.pointer_walk import Begin, Graph, Kind, Walk
from benchmarks.accuracy.walk_inputs import Inputs, Read, Walkers
from serving.network.model import dense_logits
from training.metrics import ndcg

STEPS = 4
RATE, DROPOUT = 3e-5, 0.2
NETWORK = 0.05  # its share while a walk is trained; gates that are fitted on validation give it about as much
JUDGES = 3  # one of so many validation users judges an epoch
LEAST_EFFECT = 1e-3  # of another user's state on a read (total variation), for the read to be the user's own


@dataclass(frozen=True, slots=True)
class Arm:
    """loss: -log P(target), or 1 - P(target). shuffled: the graph. steps: the most it is trained for."""

    kind: Kind = Kind()
    loss: Literal["hits", "likelihood"] = "hits"
    shuffled: bool = False
    steps: int = STEPS


WALK = "walk"
ARMS = {
    WALK: Arm(),
    "walk, by likelihood": Arm(loss="likelihood"),
    "one step, trained alone": Arm(steps=1),
    "reads frozen": Arm(Kind(queries=False)),
    "pauses, then a read": Arm(Kind(moves=False)),
    "walk on a shuffled graph": Arm(shuffled=True),
}


def train_arm(name: str, inputs: Inputs, valid: Walkers, seed: int) -> tuple[Walk, dict[str, Any]]:
    """The walk at its best epoch by validation NDCG@10, and what its check says; kept under the inputs' folder."""
    arm, graph = ARMS[name], Graph.of(inputs.memory.whole)
    torch.manual_seed(seed)
    walk = Walk(inputs.vectors, graph.shuffled(seed) if arm.shuffled else graph, arm.kind)
    file = inputs.folder / f"{name}-seed-{seed}-excluded-{inputs.excluded}.safetensors"
    check = small_modules.keep(walk, file, lambda: _train(walk, arm, inputs.held_out, valid, seed))
    row = {"model": name, "excluded": inputs.excluded, **check}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return walk, row


def _train(walk: Walk, arm: Arm, examples: Walkers, valid: Walkers, seed: int) -> dict[str, Any]:
    judges, read = valid.every(JUDGES), reads_of(walk, arm.steps)

    def batch_loss(index: np.ndarray) -> torch.Tensor:
        begin = examples.begin(index, len(walk.vectors))
        begin = begin._replace(state=F.dropout(begin.state, DROPOUT))
        return loss(walk, begin, examples.target[index], arm)

    def score() -> float:
        return float(validation_ndcg(read, judges, walk.vectors).mean())

    scores, gradient = small_modules.fit(
        walk, batch_loss, len(examples.target), score, RATE, seed, watched=walk.query.weight
    )
    effect, best_epoch = state_effect(walk, judges, arm.steps), int(np.argmax(scores))
    acts = best_epoch > 0 and (not arm.kind.queries or (gradient > 0 and effect > LEAST_EFFECT))
    return {
        "gradient": float(f"{gradient:.3g}"),
        "query": round(float(walk.query.weight.detach().norm()), 4),
        "scale": round(float(walk.scale.detach()), 4),
        "power": round(float(walk.power.detach()), 3),
        "hop": round(float(walk.log_hop.detach().exp()), 4),
        "state_effect": round(effect, 4),
        "best_epoch": best_epoch,
        "valid": [round(score, 5) for score in scores],
        "acts": acts,
    }


def loss(walk: Walk, begin: Begin, target: torch.Tensor, arm: Arm) -> torch.Tensor:
    """The mean over reads and users. Shape: target (B,) int64."""
    network = dense_logits(begin.state, walk.vectors).log_softmax(-1).gather(1, target[:, None])[:, 0] + math.log(
        NETWORK
    )
    log_p = torch.stack([
        torch.logaddexp(network, read.log_of(target) + math.log1p(-NETWORK)) for read in walk(begin, arm.steps)
    ])  # fmt: skip
    return -log_p.mean() if arm.loss == "likelihood" else (1 - log_p.exp()).mean()


def reads_of(walk: Walk, steps: int) -> Read:
    """a_1 .. a_steps."""

    @torch.inference_mode()
    def read(begin: Begin) -> list[torch.Tensor]:
        return [slots.dense(len(walk.vectors)) for slots in walk(begin, steps)]

    return read


@torch.inference_mode()
def validation_ndcg(read: Read, valid: Walkers, vectors: torch.Tensor) -> np.ndarray:
    """NDCG@10 of P above for each form of a model. An equal score ranks ahead of the target. Shape: (forms,)."""
    found = []
    for index in valid.batches():
        begin, target = valid.begin(index, len(vectors)), valid.target[index, None]
        network = NETWORK * dense_logits(begin.state, vectors).softmax(-1).masked_fill(begin.barred, 0)
        mixed = torch.stack([network + (1 - NETWORK) * share for share in read(begin)])
        own = mixed.gather(2, target.expand(len(mixed), -1, -1))
        found.append(ndcg(((mixed >= own).sum(2) - 1).numpy()))
    mean: np.ndarray = np.concatenate(found, 1).mean(1)
    return mean


@torch.inference_mode()
def state_effect(walk: Walk, valid: Walkers, steps: int) -> float:
    """How much of the last read changes when another user's state leads the walk: the total variation, 0..1."""
    found = []
    read = reads_of(walk, steps)
    for index in valid.batches():
        begin = valid.begin(index, len(walk.vectors))
        own, others = (read(each)[-1] for each in (begin, begin._replace(state=begin.state.roll(1, 0))))
        found.append((own - others).abs().sum(1) / 2)
    return float(torch.cat(found).mean())
