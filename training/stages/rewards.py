"""The rewards of stage 3, each (B, G): five [paper: names them in one line each; open: the formulas], and a sixth."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def format_reward(exists: torch.Tensor) -> torch.Tensor:
    """R = 0 if the written tokens are an item, else -1   [open: the values]. exists: (B, G) bool."""
    return exists.float() - 1


def match_reward(written: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """R = (length of the correct prefix) / M   [paper: consecutive matching tokens]. Shapes: (B, G, M), (B, M)."""
    return (written == target.unsqueeze(1)).long().cumprod(-1).float().mean(-1)


def similarity_reward(state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """R = cos(s_l, t)   [paper: predicted state against the target's representation]. Shapes: (B, G, D), (B, D)."""
    return F.cosine_similarity(state, target.unsqueeze(1), dim=-1)


def likelihood_reward(with_reasoning: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """R = sigmoid(log P(target | x, o) - log P(target | x))   [paper: with against without; open: sigmoid].

    Shapes: (B, G), (B,).
    """
    return torch.sigmoid(with_reasoning - without.unsqueeze(1))


def rank_reward(dense_logits: torch.Tensor, target: torch.Tensor, local_index: torch.Tensor) -> torch.Tensor:
    """R = 1 / rank of the target under the state   [paper: among negatives; open: these are the batch's other targets].

    Shapes: target (B,) int64 item rows of the batch (equal items are no negatives of each other); dense_logits
    (b, G, B), states of the batch's rows `local_index` (b,) against every target.
    """
    own = dense_logits.gather(-1, local_index[:, None, None].expand(-1, dense_logits.shape[1], 1))  # (b, G, 1)
    other = (target[local_index, None] != target[None, :]).unsqueeze(1)
    return 1 / (1 + ((dense_logits > own) & other).sum(-1).float())


def answer_reward(items: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """R = 1 / log2(1 + rank of the target in the answer as served), 0 where it is not in it   [open: NDCG].

    Shapes: items (B, G, K) int64, best first, target (B,).
    """
    gain = 1 / torch.arange(2, items.shape[-1] + 2, device=items.device).log2()
    return ((items == target[:, None, None]) * gain).sum(-1)
