"""The rank of each user's target, kept per user, so that any two variants can be compared over the same users."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from serving.files import atomic_write
from serving.network.eager import EagerRuntime
from serving.network.model import dense_logits
from serving.network.onnx import OnnxRuntime
from serving.network.runtime import Runtime
from serving.search.ranker import Ranker, of_some
from serving.types import Beams, EventData, Merge
from training.data.prepare import sample_events, sample_users
from training.metrics import paired_bootstrap
from training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Inference:
    """How answers are searched. union: so many of the dense score's own best items join, at `union_weight`.

    draws: instead of the model's own reasoning tokens, so many paths of random ones, each with a beam of its own; an
    item's score is the best over the paths. int8: with 8-bit weights. mixed: as the workspace's settings join its item
    memory, and with no dense score.
    """

    split: str
    steps: int
    paths: int = 1
    merge: Merge = "logsumexp"
    union: int = 0
    union_weight: float = 0.0
    draws: int = 0
    int8: bool = False
    mixed: bool = False

    @property
    def file(self) -> str:
        return "-".join(f"{name}={value}" for name, value in asdict(self).items()) + ".npz"


@dataclass(frozen=True, slots=True)
class TargetRanks:
    """Per user; a rank counts from 0, `beam` stands for "not found".

    ranks (W, U): under each of `weights` (W,) of the dense score. dense (U,): by the dense score alone, of all items.
    cosine (L + 1, U): of s_i and the target's vector. settled (L, U): of s_i and s_(i-1).
    """

    weights: np.ndarray
    ranks: np.ndarray
    dense: np.ndarray
    cosine: np.ndarray
    settled: np.ndarray

    def rank(self, weight: float) -> np.ndarray:
        ranks: np.ndarray = self.ranks[self.weights.tolist().index(weight)]
        return ranks


def evaluation_users(work: Workspace, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """All test users; of the validation users those that choose settings."""
    if split == "test":
        return list(work.split.test_history), work.split.test_target
    return sample_users(work.split.valid_history, work.split.valid_target, work.config.evaluation.choice_users)


def evaluation_events(work: Workspace, split: str) -> list[EventData] | None:
    if split == "test":
        return work.split.test_events
    return sample_events(work.split.valid_events, work.config.evaluation.choice_users)


def gain_over(own: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of a metric of the same users, with its 95% interval, and in percent of the other's mean. Shapes: (U,) both."""
    gain, low, high = paired_bootstrap(own, base, seed=0)
    row = {"gain": round(gain, 5), "low": round(low, 5), "high": round(high, 5)}
    return row | ({"percent": round(100 * gain / base.mean(), 1)} if base.mean() else {})


def load_ranks(folder: Path, inference: Inference) -> TargetRanks | None:
    file = folder / "ranks" / inference.file
    if not file.exists():
        return None
    with np.load(file) as stored:
        return TargetRanks(**stored)


def save_ranks(folder: Path, inference: Inference, ranks: TargetRanks) -> None:
    with atomic_write(folder / "ranks" / inference.file) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **asdict(ranks))


class RandomTokens(EagerRuntime):
    """Reasons with random tokens: the control for what comes from many paths alone."""

    reasoning_range = (0, 0)

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.network.step_input(torch.randint_like(token, *self.reasoning_range), state)


def ranker_of(work: Workspace, inference: Inference) -> Ranker:
    """The workspace's ranker with what `inference` changes. Unless mixed it has the dense score, to try weights on."""
    settings = replace(work.settings, paths=inference.paths, merge=inference.merge)
    if not inference.mixed:
        dense_weight = inference.union_weight if inference.union else 1.0
        settings = replace(settings, dense_candidates=inference.union, dense_weight=dense_weight, neighbours_weight=0.0)
    network, tokens, attention = work.network.eval(), work.item_tokens, work.settings.attention
    runtime: Runtime | None = None
    if inference.int8:
        runtime = OnnxRuntime(network, tokens, attention, threads=torch.get_num_threads(), int8=True)
    elif inference.draws:
        runtime = RandomTokens(network, tokens, attention)
        runtime.reasoning_range = work.vocabulary.reasoning_range
    return replace(work.ranker(runtime), settings=settings)


@torch.inference_mode()
def measure_ranks(work: Workspace, inference: Inference) -> TargetRanks:
    """Full ranking of a split's users. Seen items are permitted, as published tables do."""
    histories, target = evaluation_users(work, inference.split)
    events = evaluation_events(work, inference.split)
    weights = (inference.union_weight,) if inference.union else work.config.evaluation.dense_weights
    if inference.mixed:
        weights = (0.0,)
    vectors = work.network.item_vectors(work.item_tokens)
    torch.manual_seed(0)  # for random tokens
    ranker, beam = ranker_of(work, inference), work.config.evaluation.beam
    parts, order = [], []
    for index in ranker.batches(histories):
        batch = ranker.encode([histories[i] for i in index], of_some(events, index))
        found = [ranker.search(batch, inference.steps, beam) for _ in range(inference.draws or 1)]
        wanted = torch.from_numpy(target[index].astype(np.int64)).to(work.device)
        parts.append(_target_ranks(found, ranker.settings.dense_weight, weights, wanted, vectors, beam))
        order.append(index)
    back = np.argsort(np.concatenate(order))
    whole = [np.concatenate(columns, -1)[..., back] for columns in zip(*parts, strict=True)]
    return TargetRanks(np.array(weights), *whole)


def _target_ranks(
    found: list[Beams],
    searched: float,
    weights: tuple[float, ...],
    target: torch.Tensor,
    vectors: torch.Tensor,
    beam: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """searched: the weight under which the search ordered what it found, which is the same under any other."""
    items = torch.cat([beams.items for beams in found], 1)  # (B, P * K)
    dense = torch.cat([beams.dense for beams in found], 1)
    log_p = torch.cat([beams.scores for beams in found], 1) - searched * dense
    ranks = [rank_of_target(items, log_p + weight * dense, target, beam) for weight in weights]
    states = found[0].states[:, 0]  # (B, L + 1, D)
    by_state = dense_logits(states[:, -1], vectors)
    own = by_state.gather(1, target[:, None])
    cosine = F.cosine_similarity(states, vectors[target].unsqueeze(1), dim=-1)
    settled = F.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1)
    return (
        torch.stack(ranks).cpu().numpy().astype(np.int32),
        (by_state > own).sum(1).cpu().numpy().astype(np.int32),
        cosine.T.cpu().numpy().astype(np.float32),
        settled.T.cpu().numpy().astype(np.float32),
    )


def rank_of_target(items: torch.Tensor, scores: torch.Tensor, target: torch.Tensor, beam: int) -> torch.Tensor:
    """The target's rank among distinct items by their best score, `beam` where it is not there or beyond.

    Shapes: items, scores (B, N), target (B,) -> (B,) int64.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    items = items.gather(1, order)
    twice = (items[:, :, None] == items[:, None, :]).tril(-1).any(2)  # an item's later positions
    rank = (~twice).cumsum(1) - 1
    hit = (items == target[:, None]) & ~twice
    return torch.where(hit.any(1), (rank * hit).sum(1), beam).clamp(max=beam)
