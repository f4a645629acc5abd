"""The int8 gate: what 8-bit weights do to the answers, measured on validation users when a bundle is exported.

The engine serves a bundle with the runtime `onnx-int8` only if it passed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from serving.network.onnx import OnnxRuntime
from serving.search.ranker import TOP
from training.data.prepare import sample_events, sample_users
from training.metrics import ndcg, target_ranks
from training.workspace import Workspace

# [open] Half of one item in ten may differ, and 2% of NDCG is what a thousand users can distinguish from chance.
LEAST_OVERLAP = 0.95  # mean share of float32's top 10 that int8 finds too
LEAST_NDCG = 0.98  # share of float32's NDCG@10 that int8 keeps
USERS = 1000  # measured, at most


def int8_gate(work: Workspace) -> dict[str, Any]:
    """Compares the answers with 8-bit and with float32 weights, with the default and every evaluated number of steps.

    The result is stored in bundle.json as `int8`: `passed` (for every number of steps), `users` and `beam` of the
    measurement, `least`, which is what passing requires, and a row per number of steps in `measured`.
    """
    evaluation, settings = work.config.evaluation, work.settings
    histories, target = sample_users(work.split.valid_history, work.split.valid_target, USERS)
    events = sample_events(work.split.valid_events, USERS)
    work = replace(work, network=copy.deepcopy(work.network)).on("cpu")
    runtime = OnnxRuntime(
        work.network.eval(), work.item_tokens, settings.attention, threads=torch.get_num_threads(), int8=True
    )
    rankers = {"fp32": work.ranker(), "int8": work.ranker(runtime)}
    rows: list[dict[str, Any]] = []
    for steps in sorted({0, settings.default_steps, *evaluation.steps}):
        ranked = {
            name: ranker.rank(histories, steps, evaluation.beam, events=events) for name, ranker in rankers.items()
        }
        quality = {
            name: round(float(ndcg(target_ranks(items, target), TOP).mean()), 5) for name, items in ranked.items()
        }
        shared = round(overlap(ranked["int8"], ranked["fp32"]), 4)
        rows.append({"steps": steps, f"overlap@{TOP}": shared, f"ndcg@{TOP}": quality})
    return {
        "passed": all(passes(row) for row in rows),
        "users": len(target),
        "beam": evaluation.beam,
        "least": {f"overlap@{TOP}": LEAST_OVERLAP, f"ndcg@{TOP}": LEAST_NDCG},
        "measured": rows,
    }


def passes(row: dict[str, Any]) -> bool:
    """Whether int8 is good enough in one row of `measured`."""
    quality = row[f"ndcg@{TOP}"]
    return bool(row[f"overlap@{TOP}"] >= LEAST_OVERLAP and quality["int8"] >= LEAST_NDCG * quality["fp32"])


def overlap(ranked: np.ndarray, reference: np.ndarray) -> float:
    """Mean share of the reference's items that are in the ranked list too. Shapes: (U, K) rows, -1 where none."""
    found = (reference[:, :, None] == ranked[:, None, :]).any(2) & (reference >= 0)
    return float((found.sum(1) / (reference >= 0).sum(1)).mean())
