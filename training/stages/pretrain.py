"""Stage 1: teach the decoder outputs longer than an item, by items similar to the target put before it.

    Y = [c'_1 .. c'_q ; target],   L = - sum_{t=1}^{q+m} log P(y_t | y_<t, history)      [paper]

[open]: similar = nearest by the items' embedding, drawn among the nearest; q = whole items; these sequences begin with
`SIMILAR_START`, and the plain sequence (l = 0) is trained in the same step on the same encoder pass. Without them it is
a TIGER.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from serving.items.nearest import nearest_items
from serving.items.vocabulary import PAD
from training.config import PretrainConfig
from training.data.examples import batch_at
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import nll
from training.stages.predictions import predict_items
from training.stages.reasoning import decode_directly
from training.workspace import Workspace

# A start token of their own, which no search uses: were it that of q steps, stage 2 would have to unlearn that item
# codes follow it. Padding is what T5 starts its decoder with, and has no other use in ours.
SIMILAR_START = PAD


class PretrainStep:
    """Computes the loss of a step. Holds only what never changes: settings and each item's nearest others."""

    def __init__(self, work: Workspace, config: PretrainConfig) -> None:
        self.work, self.config = work, config
        self.nearest: torch.Tensor | None = None  # (I, neighbours) int64
        if config.similar_weight:
            vectors = F.normalize(torch.from_numpy(work.embedding), dim=1)
            itself = torch.arange(len(vectors))
            self.nearest = nearest_items(vectors, vectors, config.neighbours, excluded=itself)

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config = self.work, self.config
        batch = batch_at(work.examples, config.batch_size, work.config.seed, step)
        shard = shard.of(len(batch))
        index = shard.local(shard.micro_batch(batch))
        item = work.examples.targets(index)
        target = work.item_tokens[work.send(item)].unsqueeze(1)  # (B, 1, M)
        cross = work.encode(work.examples.histories(index))
        loss = torch.zeros(())
        terms: Terms = {}
        if config.plain_weight:
            hidden, _ = decode_directly(work.network, cross, work.vocabulary.start_tokens[0], target)
            plain = nll(predict_items(work, hidden), target, config.label_smoothing)
            loss, terms["nll"] = loss + config.plain_weight * plain, plain.detach()
        if self.nearest is not None:
            sequence = torch.cat([self.similar(item, shard), target], -1)
            hidden, _ = decode_directly(work.network, cross, SIMILAR_START, sequence)
            similar = nll(predict_items(work, hidden), sequence, config.label_smoothing)
            loss, terms["nll_similar"] = loss + config.similar_weight * similar, similar.detach()
        return shard.mean(loss, terms)

    def similar(self, item: np.ndarray, shard: BatchShard) -> torch.Tensor:
        """Tokens of items similar to the targets, drawn with the shard's generator. Shape: (B, 1, q)."""
        assert self.nearest is not None
        draw = shard.rand(len(item), self.nearest.shape[1]).argsort(1)[:, : self.config.similar_items]
        neighbours = self.nearest[torch.from_numpy(item)].gather(1, draw)
        return self.work.item_tokens[self.work.send(neighbours)].flatten(1).unsqueeze(1)
