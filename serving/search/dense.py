"""The dense score: how well an item's vector agrees with the state after reasoning.

    dense(item | s) = <s, v_item> / sqrt(D) - log Z(s),    log Z(s) = log sum over all items of exp(<s, v> / sqrt(D))

It is computed for the items that a search has found. log Z and the items with the best score of all need every vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.blocked import Blocked
from serving.items.trie import Trie
from serving.network.model import dense_logits
from serving.network.runtime import Runtime
from serving.search.decoder import NEG_INF, select_rows, stable_topk


@dataclass(frozen=True, slots=True)
class DenseScore:
    """The dense score after each of P reasoning paths, of whatever items are asked for.

    states: (B, P, D). log_partition: (B, P), log Z. best: (B, C) int64, the rows of the items with the highest score on
    the likeliest path.
    """

    states: torch.Tensor
    log_partition: torch.Tensor
    best: torch.Tensor

    def of(self, runtime: Runtime, items: torch.Tensor, path: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: items (B, N) catalogue rows, path (B, N), the likeliest for all if None -> (B, N)."""
        if path is None:
            path = torch.zeros_like(items)
        state = select_rows(self.states, path) * self.states.shape[-1] ** -0.5
        logits: torch.Tensor = (state * runtime.vectors_of(items)).sum(-1)
        return logits - self.log_partition.gather(1, path)


def dense_score(
    runtime: Runtime, trie: Trie, states: torch.Tensor, blocked: Blocked | None, candidates: int
) -> DenseScore:
    """candidates: how many permitted items to name as the best. Shape: states (B, P, D)."""
    logits = dense_logits(states, runtime.item_vectors)  # (B, P, I)
    likeliest = logits[:, 0] if blocked is None else logits[:, 0].masked_fill(blocked.items(trie), NEG_INF)
    best = stable_topk(likeliest, None, min(candidates, likeliest.shape[1]))
    return DenseScore(states, logits.logsumexp(-1), best)
