"""Trains a small module on what a frozen network knows of users; keeps its best epoch by validation, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from serving.files import atomic_write

EPOCHS, BATCH, SCALAR_RATE, DECAY = 6, 128, 5e-3, 0.1


def fit(
    module: nn.Module,
    batch_loss: Callable[[np.ndarray], torch.Tensor],
    examples: int,
    score: Callable[[], float],
    rate: float,
    seed: int,
    watched: torch.Tensor,
) -> tuple[list[float], float]:
    """Trains by AdamW and leaves the weights of the epoch with the best score.

    batch_loss: of the positions of some of so many examples. rate: of matrices; scalars have their own. watched: its
    gradient is reported. Returns the score before training and after each epoch, and the first norm of that gradient
    other than 0, or 0.
    """
    scalars = [parameter for parameter in module.parameters() if not parameter.ndim]
    matrices = [parameter for parameter in module.parameters() if parameter.ndim]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY},
                                   {"params": scalars, "lr": SCALAR_RATE, "weight_decay": 0.0}], lr=rate)  # fmt: skip
    order, scores, gradient = np.random.default_rng(seed), [score()], 0.0
    best = _weights(module)
    for _ in range(EPOCHS):
        shuffled = order.permutation(examples)
        for first in range(0, examples, BATCH):
            optimizer.zero_grad()
            batch_loss(shuffled[first : first + BATCH]).backward()  # type: ignore[no-untyped-call]
            if watched.grad is not None:
                gradient = gradient or float(watched.grad.norm())
            optimizer.step()
        scores.append(score())
        if scores[-1] > max(scores[:-1]):
            best = _weights(module)
    module.load_state_dict(best)
    return scores, gradient


def keep(module: nn.Module, file: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The module with the weights of a file, which `train` makes where there is none. Returns what `train` reported."""
    if not file.exists():
        report = train()
        with atomic_write(file) as partial:
            save_file(module.state_dict(), partial, {"check": json.dumps(report)})
    module.load_state_dict(load_file(file))
    with safe_open(file, "pt") as stored:
        kept: dict[str, Any] = json.loads(stored.metadata()["check"])
    return kept


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
