"""Looking back: a reasoning step fetches items of the user's older history, those that matter to the state.

    q_i(k) = <c * s_{i-1} + W_q s_{i-1}, v_k> / sqrt(D)      of every older item k that no step has fetched yet
    a_i    = softmax of q_i over the `fetched` largest
    r_i    = sum_k a_i(k) v_k
    s_i    = s_{i-1} + g * r_i + W_o relu(W_f s_{i-1} + W_m r_i)

s_0 and v are the state and the item vectors of a trained network, which has read the newest items of a history and
stays as it is; older are those before, OLDER at most. g, W_q and W_o are 0 at first, so that every step begins as
the network itself, and c is 1, so that what is fetched first resembles what the network expects. p is for the loss
alone: P = softmax of p times the dense score; what its scale lacks would else be learnt in place of anything else.
[open: not in the paper. As the network is frozen, a perceptron stands for the decoder's step.]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.join import LEAST_LOG

OLDER, FETCHED = 180, 10
START_POWER = 1.3  # a network trained with smoothed labels is less sure than it might be


@dataclass(frozen=True, slots=True)
class Kind:
    """queries: whether the state chooses and weighs what is fetched; else the newest, equally. fetched: items a step;
    0: a pause."""

    queries: bool = True
    fetched: int = FETCHED


class LookBack(nn.Module):
    """vectors: (I, D), the items'. Parameters are drawn from torch's generator."""

    def __init__(self, vectors: torch.Tensor, kind: Kind) -> None:
        super().__init__()
        width = vectors.shape[1]
        self.vectors, self.kind = vectors, kind
        self.query, self.of_read, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.of_state = nn.Linear(width, width)
        self.scale, self.direct, self.power = (nn.Parameter(torch.tensor(value)) for value in (1.0, 0.0, START_POWER))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, state: torch.Tensor, older: torch.Tensor, steps: int) -> torch.Tensor:
        """The states s_1 .. s_steps. Shapes: state (B, D), older as of `older_items` -> (steps, B, D)."""
        unread, vectors, states = older >= 0, F.embedding(older.clamp(min=0), self.vectors), []
        for _ in range(steps):
            hidden = self.of_state(state)
            if self.kind.fetched:
                weights, fetched = self.fetch(state, vectors, unread)
                unread = unread & ~fetched
                read = (weights.unsqueeze(1) @ vectors).squeeze(1)
                state, hidden = state + self.direct * read, hidden + self.of_read(read)
            state = state + self.out(F.relu(hidden))
            states.append(state)
        return torch.stack(states)

    def fetch(
        self, state: torch.Tensor, vectors: torch.Tensor, unread: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of what a step reads, and which items these are. Weights add up to 1, to 0 where all are read.

        Shapes: state (B, D), vectors (B, O, D), unread (B, O) bool -> (B, O) float, (B, O) bool.
        """
        if self.kind.queries:
            query = (self.scale * state + self.query(state)) * state.shape[1] ** -0.5
            logits = (vectors @ query.unsqueeze(2)).squeeze(2)
        else:
            logits = -torch.arange(unread.shape[1], dtype=vectors.dtype).expand(unread.shape)
        logits = logits.masked_fill(~unread, LEAST_LOG)
        best = logits.topk(min(self.kind.fetched, unread.shape[1])).indices
        fetched = torch.zeros_like(unread).scatter(1, best, True) & unread
        logits = logits if self.kind.queries else torch.zeros_like(logits)
        return logits.masked_fill(~fetched, LEAST_LOG).softmax(1) * fetched, fetched


def older_items(histories: Sequence[np.ndarray], newest: int) -> torch.Tensor:
    """What comes before so many of the newest items, newest first, -1 = none. Shape: (U, OLDER) int64."""
    older = np.full((len(histories), OLDER), -1, np.int64)
    for row, history in enumerate(histories):
        own = history[:-newest][::-1][:OLDER]
        older[row, : len(own)] = own
    return torch.from_numpy(older)
