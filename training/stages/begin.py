"""How stage 2 initialises reasoning, so that tokens differ from the start.

Stage 1 trains neither the reasoning codes nor the start tokens of l > 0 steps, so none of them means anything yet, and
from vectors that hardly differ the labels of every user fall on a few codes [open]. So

    start_l := start_0                          for every l: a search with steps begins where the direct one does
    MLP_r   := the identity                     exactly, as far as the sample's values reach
    c_k     := k-means centres of t - s_0       over a sample of training examples: what o_1 has to say first
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn

from training.ids.rqvae import one_thread
from training.preflight import start_afresh
from training.stages.reasoning import teacher_force_directly
from training.workspace import Workspace

SAMPLE, BATCH = 4096, 256  # examples
MARGIN = 4.0  # how far beyond the sample's largest value MLP_r is the identity, as a factor


@torch.no_grad()
def begin_reasoning(work: Workspace) -> None:
    """Sets start tokens, MLP_r and reasoning codes of a network as stage 1 left it. Follows from weights and seed.

    Reasoning codes that are item codes (`reasoning_codes` 0) have a meaning already, and stay.
    """
    network, vocabulary = work.network.eval(), work.vocabulary
    table = network.t5.shared.weight
    table[vocabulary.start_tokens] = table[vocabulary.start_tokens[0]].clone()
    residuals = first_residuals(work)
    _make_identity(network.heads.residual, MARGIN * float(residuals.abs().max()))
    if count := work.config.model.reasoning_codes:
        lo, hi = vocabulary.reasoning_range
        table[lo:hi] = centres(residuals, count, work.config.seed).to(table.device)


def first_residuals(work: Workspace) -> torch.Tensor:
    """t - s_0 of training examples drawn by the seed. Shape: (SAMPLE or fewer, D), on the CPU."""
    network = work.network
    rng = np.random.default_rng([work.config.seed, 2])
    chosen = rng.choice(len(work.examples), min(SAMPLE, len(work.examples)), replace=False)
    vectors = network.item_vectors(work.item_tokens)
    found = []
    for first in range(0, len(chosen), BATCH):
        index = chosen[first : first + BATCH]
        target = work.send(work.examples.targets(index))
        cross = work.encode_rows(work.examples, index)
        item = work.item_tokens[target].unsqueeze(1)
        _, state = teacher_force_directly(network, cross, work.vocabulary.start_tokens[0], item)
        found.append((vectors[target] - state[:, 0]).float().cpu())
    return torch.cat(found)


def centres(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """k-means centres, made distinct where there are fewer distinct points. Shape: (n, D) -> (count, D)."""
    distinct = len(np.unique(points.numpy(), axis=0))
    with one_thread():
        found = KMeans(min(count, distinct), n_init=1, max_iter=50, random_state=seed).fit(points.numpy())
    vectors = torch.from_numpy(found.cluster_centers_.astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    missing = vectors[torch.randint(len(vectors), (count - len(vectors),), generator=generator)]
    noise = torch.randn(missing.shape, generator=generator) * points.std(correction=0)
    return torch.cat([vectors, missing + noise])


def _make_identity(mlp: nn.Sequential, reach: float) -> None:
    """W ReLU(x + reach) - reach = x for all x > -reach: an MLP as it is, with weights that change nothing."""
    into, _, out = mlp
    assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
    for layer, shift in ((into, reach), (out, -reach)):
        nn.init.eye_(layer.weight)
        nn.init.constant_(layer.bias, shift)


class CollapseError(RuntimeError):
    """Reasoning tokens that tell no users apart; the message says what to change."""


def supervises_reasoning_tokens(work: Workspace) -> bool:
    """Whether a run teaches its tokens to differ, for the number of steps that validation measures them at."""
    sft, lengths, deepest = work.config.sft, work.config.lengths, max(work.config.evaluation.steps)
    labelled = work.network.step_form != "state" and sft.labels == "residual" and sft.reasoning_weight > 0
    return labelled and deepest > 0 and (not lengths or deepest in lengths)


def check_collapse(work: Workspace, stage: str, folder: Path, metrics: dict[str, float]) -> None:
    """Raises CollapseError where the tokens' mean entropy is below `sft.entropy_floor`, a share of its maximum.

    stage: the one that trains, 2 or 3. folder: the run's, for its checkpoints.
    """
    lo, hi = work.vocabulary.reasoning_range
    entropy = float(np.mean([value for name, value in metrics.items() if name.startswith("entropy/")]))
    floor = work.config.sft.entropy_floor * float(np.log(hi - lo))
    if entropy < floor:
        raise CollapseError(
            f"The reasoning tokens have collapsed: their entropy over users is {entropy:.2f} nats, below {floor:.2f}; "
            f"run with a lower {stage}.lr and with sft.balanced and sft.apart true, or with sft.entropy_floor=0 to "
            f"train on regardless, and for that {start_afresh(folder)}"
        )
