"""Accuracy by the very search that serves, and the signs by which reasoning is seen to fail."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from serving.bundle import Bundle
from serving.network.eager import EagerRuntime
from serving.network.t5 import CrossKeysValues
from serving.search.ranker import Ranker
from training.data.prepare import DataError, Dataset, split_by
from training.metrics import recall_ndcg
from training.stages.reasoning import answer, think
from training.workspace import Workspace


def measure(
    ranker: Ranker,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    steps: int,
    beam: int,
    *,
    exclude_seen: bool = False,
) -> tuple[dict[str, Any], np.ndarray]:
    """A row of a table (`steps`, `users`, recall and NDCG at 5 and 10, `beam`, `seconds`), and ranked items (U, 10)."""
    started = time.perf_counter()
    ranked = ranker.rank(histories, steps, beam, exclude_seen=exclude_seen)
    settings = ranker.settings
    row = {
        "steps": steps,
        "users": len(target),
        **{name: round(value, 5) for name, value in recall_ndcg(ranked, target).items()},
        "beam": beam,
        "paths": settings.paths,
        "dense_weight": settings.dense_weight,
        "neighbours_weight": settings.neighbours_weight,
        "dense_candidates": settings.dense_candidates,
        "excluded": exclude_seen,
    }
    return row | {"seconds": round(time.perf_counter() - started, 2)}, ranked


def sample_users(
    histories: Sequence[np.ndarray], target: np.ndarray, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The same `count` users every time, drawn without regard to order."""
    chosen = np.random.default_rng(0).permutation(len(target))[:count]
    return [histories[row] for row in chosen], target[chosen]


@torch.no_grad()
def validate(work: Workspace, reasons: bool = True) -> dict[str, Any]:
    """Validation while training: NDCG@10 per l, and per l > 0 the failure signs of `signs`.

    "score", what a stage keeps its best weights by, is the mean over the measured l, for one checkpoint has to serve
    them all; while a stage does not train answers after reasoning yet (`reasons` False), it is that of l = 0.
    """
    evaluation = work.config.evaluation
    histories, target = sample_users(work.split.valid_history, work.split.valid_target, evaluation.valid_users)
    ranker = work.ranker()
    result: dict[str, Any] = {}
    for steps in sorted({0, *evaluation.steps}):
        row, _ = measure(ranker, histories, target, steps, evaluation.beam)
        result[f"ndcg@10/l{steps}"] = row["ndcg@10"]
    judged = evaluation.steps if reasons else (0,)
    result["score"] = float(np.mean([result[f"ndcg@10/l{steps}"] for steps in judged]))
    deepest = max(evaluation.steps)
    return result | signs(work, histories[:500], target[:500], deepest)


@torch.no_grad()
def signs(work: Workspace, histories: Sequence[np.ndarray], target: np.ndarray, steps: int) -> dict[str, float]:
    """What tells that reasoning goes wrong, with `steps` steps and the model's own tokens:

    entropy/i of the reasoning tokens of step i over users (nats; near 0: collapse), cosine/i of s_i and the target's
    representation (falling: drift), unparsable: the share of greedy outputs without the trie that are no item.
    """
    ranker = work.ranker()
    batch = ranker.encode(histories)
    beams = ranker.search(batch, steps, beam=1)
    result = {}
    lo, hi = work.vocabulary.reasoning_range
    for i in range(beams.reasoning_tokens.shape[-1]):
        share = torch.bincount(beams.reasoning_tokens[:, 0, i] - lo, minlength=hi - lo).float()
        share = share[share > 0] / share.sum()
        result[f"entropy/{i + 1}"] = float(-(share * share.log()).sum())
    wanted = ranker.runtime.item_vectors[torch.from_numpy(target.astype(np.int64))]
    for i in range(steps + 1):
        result[f"cosine/{i}"] = float(F.cosine_similarity(beams.states[:, 0, i], wanted, dim=-1).mean())
    result["unparsable"] = unparsable_share(work, batch.cross, steps)
    return result


@torch.no_grad()
def unparsable_share(work: Workspace, memory: CrossKeysValues, steps: int) -> float:
    """Share of greedy outputs, written without the trie, that are not an item of the catalogue."""
    lo, hi = work.vocabulary.reasoning_range
    network = work.network
    thought = think(
        network,
        memory,
        work.vocabulary.start_tokens[steps],
        steps,
        lambda _, logits, __: logits[..., lo:hi].argmax(-1) + lo,
    )
    batch, levels = memory.mask.shape[0], work.item_tokens.shape[1]
    written = torch.zeros(batch, 1, levels, dtype=torch.int64, device=work.device)
    for level in range(levels):  # levels is 3 to 5: running the prefix again is simpler than a cache
        logits, _ = answer(network, memory, thought, written)
        written[..., level] = logits[:, :, level].argmax(-1)
    return float(1 - exists(written[:, 0], work.item_tokens).float().mean())


def exists(written: torch.Tensor, item_tokens: torch.Tensor) -> torch.Tensor:
    """Which token rows are items. Shapes: (..., M), (I, M) -> (...) bool."""
    low, high = item_tokens.amin(0), item_tokens.amax(0)
    span = high - low + 2  # each level's own tokens, and one number for all others; small enough for int64
    place = torch.cat([span.new_ones(1), span.flip(0).cumprod(0)[:-1]]).flip(0)

    def number(tokens: torch.Tensor) -> torch.Tensor:
        own = (tokens >= low) & (tokens <= high)
        return (torch.where(own, tokens - low, span - 1) * place).sum(-1)

    return torch.isin(number(written), number(item_tokens))


def evaluate_bundle(
    bundle: Bundle,
    data: Dataset,
    steps: Sequence[int],
    split: str,
    beam: int,
    users: int,
    exclude_seen: bool,
    paths: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per number of steps for a bundle on a data folder, split as for training. DataError where items differ.

    users 0: all of them. paths None: the bundle's.
    """
    settings = bundle.settings if paths is None else replace(bundle.settings, paths=paths)
    rows = [bundle.catalogue.row(item_id) for item_id in data.items.item_ids]
    if None in rows:
        missing = data.items.item_ids[rows.index(None)]
        raise DataError(
            f"{data.name} has the item {missing!r}, which the bundle does not know; "
            "evaluate on the data it was trained on."
        )
    to_row = np.asarray(rows, dtype=np.int64)
    held_out = split_by(data, bundle.about.get("config", {}).get("split", "leave-one-out"))
    histories = held_out.test_history if split == "test" else held_out.valid_history
    target = held_out.test_target if split == "test" else held_out.valid_target
    histories, target = sample_users(histories, target, users or len(target))
    histories, target = [to_row[history] for history in histories], to_row[target]
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(bundle.network, tokens, settings.attention)
    ranker = Ranker.of(runtime, bundle.vocabulary, settings, bundle.neighbours)
    for number in steps:
        row, _ = measure(ranker, histories, target, number, beam, exclude_seen=exclude_seen)
        yield row | {"split": split}
