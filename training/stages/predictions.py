"""What the decoder predicts at successive positions: log P of the tokens that may stand there.

    P(y_t | y_<t, x) = exp(p(y_t) / tau) / sum_c exp(p(c) / tau)

[paper]: c runs over the whole vocabulary C. [open, the default]: over the codes of the item's level, or the reasoning
codes. Over all of C, a token is a negative at every position it can never stand at; reasoning codes and start tokens,
which stage 1 never writes, are nothing else, and end as one vector. A block is also a fraction of the output layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from training.workspace import Workspace

Block = tuple[int, int]  # [first, last + 1) of some ids


@dataclass(frozen=True, slots=True)
class Predictions:
    """T positions of Q sequences of B histories.

    log_probs: per position (B, Q, C_t), of the ids first_t .. first_t + C_t - 1. first: these first ids.
    """

    log_probs: list[torch.Tensor]
    first: list[int]

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """log P of given tokens. Shape: (B, Q, T) int64 -> (B, Q, T)."""
        chosen = [
            log_probs.gather(-1, (tokens[..., t] - first).unsqueeze(-1))
            for t, (log_probs, first) in enumerate(zip(self.log_probs, self.first, strict=True))
        ]
        return torch.cat(chosen, -1)


def predict(work: Workspace, hidden: Sequence[torch.Tensor], blocks: Iterable[Block]) -> Predictions:
    """From the decoder's outputs (B, Q, D) at T positions and the block of ids that may stand at each."""
    t5, settings = work.network.t5, work.settings
    of_block = settings.normalise == "block"
    log_probs, first = [], []
    for output, block in zip(hidden, blocks, strict=False):
        logits = t5.logits(output, block if of_block else None)
        log_probs.append((logits / settings.temperature).log_softmax(-1))
        first.append(block[0] if of_block else 0)
    return Predictions(log_probs, first)


def predict_items(work: Workspace, hidden: torch.Tensor) -> Predictions:
    """Of an item's tokens, or of several items' one after the other. Shape: hidden (B, Q, T, D)."""
    return predict(work, hidden.unbind(2), cycle(work.vocabulary.level_ranges))


def predict_reasoning(work: Workspace, hidden: Sequence[torch.Tensor]) -> Predictions:
    """Of reasoning tokens, from the outputs (B, Q, D) that they were chosen from."""
    return predict(work, hidden, [work.vocabulary.reasoning_range] * len(hidden))
