"""The pointer walk: a reasoning step reads the item memory, follows the item graph from what it read, and reads again.

    a_i = softmax over slots k of [ p * b_k + <c * s_{i-1} + W_q s_{i-1}, v_k> / sqrt(D) ]       the read of step i
    s_i = s_{i-1} + W_o relu(W_f s_{i-1} + W_m sum_k a_i(k) v_k)                                 the state after it

The slots of the first step are the memory's SLOTS best items for the history, with b = log share. After every step the
best MOVES slots bring their NEIGHBOURS best neighbours in the graph as further slots, with b = h + log a_i(k) / p + log
of w(k, j) / sum_j w(k, j). An item may have several slots: their probabilities add up. s_0 and v are the state and the
item vectors of a trained network, which stays as it is. c, W_q and W_o are 0 at first, so that every walk begins as the
memory itself, raised to a power as where it is served. [open: not in the paper. As the network is frozen, a perceptron
stands for the decoder's step.]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from serving.items.neighbours import Neighbours
from serving.network.model import dense_logits
from training.join import LEAST_LOG

SLOTS, NEIGHBOURS, MOVES = 128, 32, 4
START_POWER = 3.0  # a memory spreads its shares over all that a history touches


class Slots(NamedTuple):
    """items: (B, R) int64 catalogue rows. log_weight: (B, R) float32, LEAST_LOG for an empty slot."""

    items: torch.Tensor
    log_weight: torch.Tensor

    def log_of(self, item: torch.Tensor) -> torch.Tensor:
        """The log of what an item's slots weigh together. Shape: item (B,) -> (B,)."""
        return self.log_weight.masked_fill(self.items != item[:, None], LEAST_LOG).logsumexp(1)

    def dense(self, items: int) -> torch.Tensor:
        """What every item of a catalogue of so many weighs. Shape: (B, I)."""
        empty = self.log_weight.new_zeros(len(self.items), items)
        return empty.scatter_add(1, self.items, self.log_weight.exp())


def best_slots(shares: torch.Tensor) -> Slots:
    """The SLOTS largest shares, divided by their sum. Shape: (B, I) float, 0 or more."""
    best = shares.topk(min(SLOTS, shares.shape[1]))
    total = best.values.sum(1, keepdim=True)
    return Slots(best.indices, (best.values / total.where(total > 0, 1)).log().clamp(min=LEAST_LOG))


class Graph(NamedTuple):
    """items: (I, NEIGHBOURS) int64, each item's best neighbours. log_weight: (I, NEIGHBOURS) float32, rows add up to 1;
    LEAST_LOG where there are fewer."""

    items: torch.Tensor
    log_weight: torch.Tensor

    @staticmethod
    def of(memory: Neighbours) -> Graph:
        items = np.zeros((len(memory), NEIGHBOURS), np.int64)
        weights = np.zeros((len(memory), NEIGHBOURS), np.float32)
        for row, (begin, end) in enumerate(zip(memory.offsets[:-1], memory.offsets[1:], strict=True)):
            best = begin + np.argsort(-memory.weights[begin:end], kind="stable")[:NEIGHBOURS]
            items[row, : len(best)], weights[row, : len(best)] = memory.items[best], memory.weights[best].clip(min=0)
        sums = weights.sum(1, keepdims=True)
        log_weight = torch.from_numpy(weights / np.where(sums > 0, sums, 1)).log().clamp(min=LEAST_LOG)
        return Graph(torch.from_numpy(items), log_weight)

    def shuffled(self, seed: int) -> Graph:
        """Every item with the neighbours of another one: a control."""
        order = torch.randperm(len(self.items), generator=torch.Generator().manual_seed(seed))
        return Graph(self.items[order], self.log_weight[order])


class Begin(NamedTuple):
    """What B walks begin with. state: (B, D). slots: of the memory. rested, barred: (B, I) bool, the items that are not
    followed, as the history has brought their neighbours already, and those that the rule excludes."""

    state: torch.Tensor
    slots: Slots
    rested: torch.Tensor
    barred: torch.Tensor


@dataclass(frozen=True, slots=True)
class Kind:
    """What takes part. queries: c and W_q. moves: reads between the states, and further slots; else pauses."""

    queries: bool = True
    moves: bool = True


class Walk(nn.Module):
    """vectors: (I, D), the items'. Parameters are drawn from torch's generator."""

    def __init__(self, vectors: torch.Tensor, graph: Graph, kind: Kind) -> None:
        super().__init__()
        width = vectors.shape[1]
        self.vectors, self.graph, self.kind = vectors, graph, kind
        self.query, self.of_read, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.of_state = nn.Linear(width, width)
        self.scale, self.power, self.log_hop = (nn.Parameter(torch.tensor(value)) for value in (0.0, START_POWER, -1.0))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, begin: Begin, steps: int) -> list[Slots]:
        """The reads a_1 .. a_steps."""
        state, slots, reads = begin.state, begin.slots, []
        for step in range(1, steps + 1):
            logits = self.power * slots.log_weight
            if self.kind.queries:
                query = self.scale * state + self.query(state)
                logits = logits + dense_logits(query, self.vectors).gather(1, slots.items)
            read = Slots(slots.items, logits.log_softmax(1))
            reads.append(read)
            if step < steps:
                state = self._next_state(state, read)
                slots = self._moved(slots, read, begin) if self.kind.moves else slots
        return reads

    def _next_state(self, state: torch.Tensor, read: Slots) -> torch.Tensor:
        hidden = self.of_state(state)
        if self.kind.moves:
            content = F.embedding_bag(read.items, self.vectors, mode="sum", per_sample_weights=read.log_weight.exp())
            hidden = hidden + self.of_read(content)
        next_state: torch.Tensor = state + self.out(F.relu(hidden))
        return next_state

    def _moved(self, slots: Slots, read: Slots, begin: Begin) -> Slots:
        follows = read.log_weight.masked_fill(begin.rested.gather(1, read.items), LEAST_LOG)
        best = follows.topk(min(MOVES, follows.shape[1]))
        source = read.items.gather(1, best.indices)  # (B, MOVES)
        items = self.graph.items[source].flatten(1)
        brought = self.log_hop + (best.values / self.power).unsqueeze(-1) + self.graph.log_weight[source]
        brought = brought.flatten(1).masked_fill(begin.barred.gather(1, items), LEAST_LOG)
        return Slots(torch.cat([slots.items, items], 1), torch.cat([slots.log_weight, brought], 1))
