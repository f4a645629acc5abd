"""How reasoning fails, measured: tokens that collapse, states that drift, outputs that are no item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from serving.network.t5 import CrossKeysValues
from serving.types import EventData
from training.stages.predictions import predict_items
from training.stages.reasoning import greedy, reason, teacher_force
from training.workspace import Workspace


@torch.no_grad()
def reasoning_diagnostics(
    work: Workspace,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    steps: int,
    events: Sequence[EventData] | None = None,
) -> dict[str, float]:
    """Figures of `steps` steps with the model's own tokens.

    entropy/i: of the reasoning tokens of step i over users, in nats; near 0 they have collapsed. codes/cosine: mean of
    all pairs of reasoning codes; near 1 they are one. cosine/i: of s_i and the target's representation; falling with i,
    the state drifts. unparsable: see `unparsable_share`.
    """
    ranker = work.ranker()
    batch = ranker.encode(histories, events)
    beams = ranker.search(batch, steps, beam=1)
    lo, hi = work.vocabulary.reasoning_range
    result = {"codes/cosine": pairwise_cosine(work.network.t5.shared.weight[lo:hi])}
    for i in range(beams.reasoning_tokens.shape[-1]):
        share = torch.bincount(beams.reasoning_tokens[:, 0, i] - lo, minlength=hi - lo).float()
        share = share[share > 0] / share.sum()
        result[f"entropy/{i + 1}"] = float(-(share * share.log()).sum())
    wanted = ranker.runtime.item_vectors[torch.from_numpy(target.astype(np.int64))]
    for i in range(steps + 1):
        result[f"cosine/{i}"] = float(F.cosine_similarity(beams.states[:, 0, i], wanted, dim=-1).mean())
    result["unparsable"] = unparsable_share(work, batch.cross, steps)
    return result


def pairwise_cosine(vectors: torch.Tensor) -> float:
    """Mean over all pairs of different rows. Shape: (n, D)."""
    count, unit = len(vectors), F.normalize(vectors.float(), dim=-1)
    return float((unit.sum(0).square().sum() - count) / max(1, count * (count - 1)))


@torch.no_grad()
def unparsable_share(work: Workspace, cross: CrossKeysValues, steps: int) -> float:
    """Share of greedy outputs, written without the trie, that are not an item of the catalogue."""
    network, vocabulary = work.network, work.vocabulary
    trace = reason(network, cross, vocabulary.start_tokens[steps], steps, greedy(network, vocabulary.reasoning_range))
    batch, levels = cross.bias.shape[0], work.item_tokens.shape[1]
    written = torch.zeros(batch, 1, levels, dtype=torch.int64, device=work.device)
    for level in range(levels):  # levels are few: running the prefix again is simpler than a cache
        predictions = predict_items(work, teacher_force(network, cross, trace, written)[0])
        written[..., level] = predictions.log_probs[level].argmax(-1) + predictions.first[level]
    return float(1 - are_items(written[:, 0], work.item_tokens).float().mean())


def are_items(written: torch.Tensor, item_tokens: torch.Tensor) -> torch.Tensor:
    """Which token rows are items, without a wait for the device. Shapes: (..., M), (I, M) -> (...) bool."""
    low, high = item_tokens.amin(0), item_tokens.amax(0)
    found = ((written >= low) & (written <= high)).all(-1)
    item = torch.zeros_like(item_tokens[:, 0])  # a number per prefix, of the items' rows and of the written ones
    row = torch.zeros_like(written[..., 0])
    for level, span in enumerate(high - low + 1):
        item = item * span + item_tokens[:, level] - low[level]
        row = row * span + written[..., level] - low[level]
        known = item.sort().values
        item, row_place = torch.searchsorted(known, item), torch.searchsorted(known, row).clamp(max=len(known) - 1)
        found = found & (known[row_place] == row)  # numbers below I stand for prefixes, so that none overflows
        row = row_place
    return found
