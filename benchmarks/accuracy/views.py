"""One network over several trees of semantic IDs, and what answers through its trees are worth together.

A tree is a tokenizer: codes of another seed and source, hence items that share a prefix here do not share one there.
The network has one set of weights; each tree has ids, a start token and a trie of its own, and a *view* is the network
as it reads and answers through one of them: history and target in that tree's codes, so encoder states differ by view.

    step n trains view n mod T, on the plain loss of stage 1     [open: MTGRec draws a tokenizer per epoch]
    merged score(item) = mean over the views of P(item), or the sum over them of 1 / (5 + rank)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from benchmarks.accuracy.full_ranking import top_items
from serving.items.trie import build_trie
from serving.items.vocabulary import FIRST_START, Vocabulary
from serving.types import Rules
from training.config import RunConfig
from training.config_file import ConfigError
from training.stages.distributed import BatchShard, Terms
from training.stages.loop import Step
from training.stages.pretrain import PretrainStep
from training.workspace import Workspace, make_workspace

BATCH = 512  # users whose lists are merged together


@dataclass(frozen=True, slots=True)
class ViewVocabulary(Vocabulary):
    """One tree's part of a vocabulary of several, without reasoning.

    number: of the view. first_code: the id of the tree's first code.
    """

    number: int = 0
    first_code: int = 0

    @property
    def start_tokens(self) -> list[int]:
        return [FIRST_START + self.number]

    @property
    def item_offset(self) -> int:
        return self.first_code


@dataclass(frozen=True, slots=True)
class Lists:
    """What a beam found, best first. Shapes: items (U, K) int64, -1 = none; log_p (U, K) float32."""

    items: np.ndarray
    log_p: np.ndarray


def views_of(trees: Sequence[Workspace], config: RunConfig) -> list[Workspace]:
    """A fresh network over the codes of all trees, as a view per tree. Of one tree it is the plain network.

    ConfigError where there are more trees than start tokens.
    """
    if len(trees) > config.model.max_steps + 1:
        raise ConfigError(f"{len(trees)} trees need model.max_steps={len(trees) - 1} or more, a start token each.")
    codes = np.concatenate([tree.item_tokens_np - tree.vocabulary.level_offsets for tree in trees], 1)
    sizes = tuple(size for tree in trees for size in tree.vocabulary.codebook_sizes)
    first = trees[0]
    joint = make_workspace(config, first.split, codes, sizes, first.embedding, first.device)
    views, level = [], 0
    for number, tree in enumerate(trees):
        sizes, first_code = tree.vocabulary.codebook_sizes, int(joint.vocabulary.level_offsets[level])
        tokens = np.ascontiguousarray(joint.item_tokens_np[:, level : level + len(sizes)])
        view = replace(
            joint,
            vocabulary=ViewVocabulary(0, sizes, 0, number=number, first_code=first_code),
            item_tokens=torch.from_numpy(tokens).to(joint.device),
            item_tokens_np=tokens,
            trie=build_trie(tokens, joint.device),
        )
        views.append(view)
        level += len(sizes)
    return views


def training_step(views: Sequence[Workspace]) -> Step:
    """Stage 1 of all views, one after the other."""
    steps = [PretrainStep(view, view.config.pretrain) for view in views]

    def step(number: int, shard: BatchShard) -> tuple[torch.Tensor, Terms]:
        return steps[number % len(steps)](number, shard)

    return step


@torch.inference_mode()
def find_lists(view: Workspace, histories: Sequence[np.ndarray], beam: int, exclude_seen: bool) -> Lists:
    """What a view answers to U histories."""
    found = Lists(np.full((len(histories), beam), -1), np.full((len(histories), beam), -np.inf, np.float32))
    ranker = view.ranker()
    for index in ranker.batches(histories):
        chosen = [histories[i] for i in index]
        rules = [Rules(exclude=tuple(history.tolist())) if exclude_seen else Rules() for history in chosen]
        with ranker.rules.blocked(rules) as blocked:
            beams = ranker.search(ranker.encode(chosen), 0, beam, blocked)
        width = beams.items.shape[1]
        found.items[index, :width] = beams.items.cpu().numpy()
        found.log_p[index, :width] = beams.scores.cpu().numpy()
    return found


Weigh = Callable[[Lists], np.ndarray]  # what each rank of each list is worth. Shape: (U, K)


def _reciprocal_rank(lists: Lists) -> np.ndarray:
    return np.broadcast_to(1 / (5 + np.arange(lists.items.shape[1])), lists.items.shape)


MERGES: dict[str, Weigh] = {"mean probability": lambda lists: np.exp(lists.log_p), "reciprocal rank": _reciprocal_rank}


def merge(lists: Sequence[Lists], weigh: Weigh, items: int) -> np.ndarray:
    """The ten best of so many items by the sum of what they are worth in each list; ties by a seeded draw.

    Shape: (U, 10) int64, -1 = none.
    """
    users, ranked = len(lists[0].items), []
    weights = [weigh(one) for one in lists]
    for begin in range(0, users, BATCH):
        rows = slice(begin, min(begin + BATCH, users))
        scores = np.zeros((rows.stop - begin, items))
        for one, weight in zip(lists, weights, strict=True):
            user, rank = np.nonzero(one.items[rows] >= 0)
            np.add.at(scores, (user, one.items[rows][user, rank]), weight[rows][user, rank])
        ranked.append(top_items(np.where(scores > 0, scores, -np.inf)))
    return np.concatenate(ranked)


def overlap(tops: Sequence[np.ndarray]) -> float:
    """The share of a list's items that another one has too, a mean over all pairs. Shape of each: (U, 10)."""
    shares = []
    for one, other in combinations(tops, 2):
        both = (one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None]
        shares.append(both.sum() / (one >= 0).sum())
    return float(np.mean(shares))


def correlation(metrics: Sequence[np.ndarray]) -> float:
    """Pearson's correlation over users of a metric, and so of its errors; a mean over all pairs. Shape of each: (U,)"""
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in combinations(metrics, 2)]))
