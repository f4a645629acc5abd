"""Stage 1: teach the decoder outputs longer than an item, by items similar to the target put before it.

    Y = [c'_1 .. c'_q ; target],   L = - sum_{t=1}^{q+m} log P(y_t | y_<t, history)      [paper]

[open]: similar = nearest by the items' embedding, drawn among the nearest; q = whole items; these sequences begin with
`SIMILAR_START`, and the plain sequence (l = 0) is trained in the same step on the same encoder pass. Without them it is
a TIGER.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from serving.items.vocabulary import PAD
from training.config import PretrainConfig
from training.data.examples import Rows, batch_at
from training.similar import similar_items
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import full_softmax, nll
from training.stages.predictions import predict_items
from training.stages.reasoning import teacher_force_directly
from training.workspace import Workspace

# A start token of their own, which no search uses: were it that of q steps, stage 2 would have to unlearn that item
# codes follow it. Padding is what T5 starts its decoder with, and has no other use in ours.
SIMILAR_START = PAD


class PretrainStep:
    """Computes the loss of a step. Holds only what never changes: settings and each item's nearest others."""

    kept = None

    def __init__(self, work: Workspace, config: PretrainConfig) -> None:
        self.work, self.config = work, config
        self.rows: Rows = work.windows or work.examples

    @cached_property
    def nearest(self) -> torch.Tensor:
        """Each item's nearest others, itself where an index has found fewer; a stage that is done does not need them.

        Shape: (I, neighbours) int64.
        """
        vectors = F.normalize(torch.from_numpy(self.work.embedding), dim=1)
        found = similar_items(vectors, self.config.neighbours).long()
        return found.where(found >= 0, torch.arange(len(found))[:, None])

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config = self.work, self.config
        batch = self.batch(step)
        shard, counts = shard.of(len(batch)), self.rows.counts[batch]
        targets = int(shard.micro_batch(counts).max())
        read = work.read(self.rows, shard.local(shard.micro_batch(batch)), targets)
        target = work.item_tokens[work.send(read.item)]  # (B, T, M)
        real = None if read.real.all() else work.send(np.flatnonzero(read.real))
        loss = torch.zeros(())
        terms: Terms = {}

        def of_targets(values: torch.Tensor) -> torch.Tensor:  # (B, T, ...) -> (targets, ...)
            flat = values.flatten(0, 1)
            return flat if real is None else flat.index_select(0, real)

        def mean_nll(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            hidden, tokens = of_targets(hidden).unsqueeze(1), of_targets(tokens).unsqueeze(1)
            return nll(predict_items(work, hidden), tokens, config.label_smoothing)

        if config.plain_weight or config.state_weight:
            hidden, state = teacher_force_directly(work.network, read.cross, work.vocabulary.start_tokens[0], target)
            if config.plain_weight:
                plain = mean_nll(hidden, target)
                loss, terms["nll"] = loss + config.plain_weight * plain, plain.detach()
            if config.state_weight:
                vectors, item = work.network.item_vectors(work.item_tokens), work.send(read.item[read.real])
                of_state = full_softmax(of_targets(state), vectors, item, config.label_smoothing)
                loss, terms["state"] = loss + config.state_weight * of_state, of_state.detach()
        if config.similar_weight:
            sequence = torch.cat([self.similar(read.item, shard), target], -1)
            hidden, _ = teacher_force_directly(work.network, read.cross, SIMILAR_START, sequence)
            similar = mean_nll(hidden, sequence)
            loss, terms["nll_similar"] = loss + config.similar_weight * similar, similar.detach()
        return shard.mean(loss, terms, counts)

    def batch(self, step: int) -> np.ndarray:
        """The step's rows of `rows`. Shape: (B,) int64."""
        return batch_at(self.rows, self.config.batch_size, self.work.config.seed, step)

    def similar(self, item: np.ndarray, shard: BatchShard) -> torch.Tensor:
        """Tokens of items similar to the targets (B, T), drawn with the shard's generator. Shape: (B, T, q)."""
        draw = shard.rand(*item.shape, self.nearest.shape[1]).argsort(-1)[..., : self.config.similar_items]
        neighbours = self.nearest[torch.from_numpy(item)].gather(-1, draw)
        return self.work.item_tokens[self.work.send(neighbours)].flatten(2)
