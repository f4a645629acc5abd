"""The network: a T5 and the heads of the method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from serving.network.t5 import T5, ModelConfig
from serving.types import StepForm


class Heads(nn.Module):
    """The method's MLPs, the feedback of the state, and the items' dense vectors.

    state      s_i = MLP_s(sum_{j<=i} d_j)                 [paper, stage 2]
    residual   r_i = MLP_r(t - s_{i-1})                    [paper, stage 2]
    feedback   input of step i gets W s_{i-1}              [open: continuous thinking, zero at the start]
    item_free  v = sum of the item's token embeddings + a free vector   [open: what the dense score compares with]
    """

    def __init__(self, width: int, items: int) -> None:
        super().__init__()
        self.state = _mlp(width)
        self.residual = _mlp(width)
        self.feedback = nn.Linear(width, width, bias=False)
        self.item_free = nn.Embedding(items, width)
        nn.init.zeros_(self.feedback.weight)
        nn.init.zeros_(self.item_free.weight)


class StreamRec(nn.Module):
    """T5 and heads together, with what needs both: the input of a reasoning step and the vectors of items."""

    def __init__(self, config: ModelConfig, items: int, step_form: StepForm) -> None:
        super().__init__()
        self.t5 = T5(config)
        self.heads = Heads(config.d_model, items)
        self.step_form = step_form

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The decoder's input for a reasoning step: the token o_i, the fed-back state s_{i-1}, or both.

        Shapes: token (B, Q) int64, state (B, Q, D) -> (B, Q, D).
        """
        step: torch.Tensor
        if self.step_form == "token":
            step = self.t5.shared(token)
        elif self.step_form == "state":
            step = self.heads.feedback(state)
        else:
            step = self.t5.shared(token) + self.heads.feedback(state)
        return step

    def item_vectors(self, item_tokens: torch.Tensor) -> torch.Tensor:
        """v of every item. Shapes: (I, M) int64 -> (I, D)."""
        vectors: torch.Tensor = self.t5.shared(item_tokens).sum(1) + self.heads.item_free.weight
        return vectors


def dense_logits(state: torch.Tensor, item_vectors: torch.Tensor) -> torch.Tensor:
    """<s, v_i> / sqrt(D), the state against every item. Shapes: (..., D), (I, D) -> (..., I)."""
    return F.linear(state * state.shape[-1] ** -0.5, item_vectors)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
