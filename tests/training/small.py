"""A workspace small enough to overfit in seconds: 30 items that follow each other in a circle, 60 users who walk it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training.config import RunConfig
from training.config_file import load_config
from training.data.prepare import Split
from training.workspace import Workspace, make_workspace

ITEMS, USERS = 30, 60
MODEL = (
    "model.d_model=16", "model.d_kv=8", "model.d_ff=32", "model.layers=1", "model.heads=2", "model.dropout=0",
    "model.max_items=5", "model.max_steps=2", "model.reasoning_codes=6", "evaluation.steps=[0,2]",
    "evaluation.valid_users=40", "evaluation.choice_users=40", "evaluation.beam=12", "evaluation.dense_weights=[0,1]",
)  # fmt: skip


def small_config(*overrides: str, file: Path | None = None) -> RunConfig:
    return load_config(file, [*MODEL, *overrides])


def walks(seed: int = 0) -> list[np.ndarray]:
    """Per user 5..8 items: the next item is always 7 further round the circle."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(ITEMS) + 7 * np.arange(rng.integers(5, 9))) % ITEMS for _ in range(USERS)]


def small_workspace(config: RunConfig, seed: int = 0) -> Workspace:
    sequences = [walk.astype(np.int32) for walk in walks(seed)]
    users = np.arange(USERS)
    split = Split(
        train=[s[:-2] for s in sequences],
        valid_history=[s[:-2] for s in sequences],
        valid_target=np.array([s[-2] for s in sequences], dtype=np.int32),
        test_history=[s[:-1] for s in sequences],
        test_target=np.array([s[-1] for s in sequences], dtype=np.int32),
        train_users=users,
        valid_users=users,
        test_users=users,
    )
    rng = np.random.default_rng(seed)
    sizes = (5, 4, 4)
    codes = np.stack(np.unravel_index(rng.choice(80, ITEMS, replace=False), sizes), 1)
    work = make_workspace(config, split, codes, sizes, rng.standard_normal((ITEMS, 8)).astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*work.network.heads.feedback.parameters(), *work.network.heads.item_free.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)  # zero at the start would hide mistakes
    return work


def overfit(step, network: torch.nn.Module, name: str, updates: int = 40, lr: float = 1e-2) -> list[float]:
    """The value of one logged term over updates on one batch with the same random draws every time."""
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    values = []
    for update in range(updates):
        network.train()
        torch.manual_seed(update if name.startswith("reward") else 0)
        loss, terms = step(0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(terms[name])
    return values
