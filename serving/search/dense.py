"""The dense score: how well an item's vector agrees with the state after reasoning.

    dense(item | s) = <s, v_item> / sqrt(D) - log Z(s),    log Z(s) = log sum over all items of exp(<s, v> / sqrt(D))

The score is computed for the items that a search has found. log Z and the items with the best score of all need every
vector, which a search compares with the states as long as there are few, or on a GPU. Both are of the bundle's own
items: what is added or taken away while it is served changes no score of others. A larger catalogue has an index
(`serving/items/item_index.py`), which names some items with the highest score and may miss others. log Z is then

    log( sum over those named of exp(x)  +  how many others * mean of exp(x) over those of a sample that are not named )

after Mussmann and Ermon (2016): the few items that dominate the sum are in it, and the sample stands for the rest,
what the index misses included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from serving.items.blocked import Blocked
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.network.model import dense_logits
from serving.network.runtime import Runtime
from serving.search.decoder import select_rows, stable_topk
from serving.types import NEG_INF

if TYPE_CHECKING:
    from serving.items.item_index import ItemIndex

BEST = 64  # items that an index is asked for, at least


class Best(NamedTuple):
    """The items with the highest dense score on the likeliest path, in no order.

    items: (B, C) int64 catalogue rows, NO_ITEM where there are fewer. scores: (B, C) float32.
    """

    items: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class DenseScore:
    """The dense score after each of P reasoning paths, of whatever items are asked for.

    states: (B, P, D). log_partition: (B, P), log Z. best: None if they were not asked for.
    """

    states: torch.Tensor
    log_partition: torch.Tensor
    best: Best | None

    def of(self, runtime: Runtime, items: torch.Tensor, path: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: items (B, N) catalogue rows, path (B, N), the likeliest for all if None -> (B, N)."""
        if path is None:
            path = torch.zeros_like(items)
        state = select_rows(self.states, path) * self.states.shape[-1] ** -0.5
        logits: torch.Tensor = (state * runtime.vectors_of(items)).sum(-1)
        return logits - self.log_partition.gather(1, path)


def dense_score(runtime: Runtime, trie: Trie, states: torch.Tensor, blocked: Blocked | None, best: int) -> DenseScore:
    """best: how many permitted items to name as those, or 0. Shape: states (B, P, D).

    With an index the best are named whether permitted or not: rules that leave few of them leave few candidates, and
    the beam's items alone fill the list.
    """
    if runtime.item_index is not None:
        return _by_index(runtime, runtime.item_index, states, best)
    logits = dense_logits(states, runtime.item_vectors)  # (B, P, I)
    log_partition, named = logits.logsumexp(-1), None
    if best:
        is_barred = (trie.leaf < 0).unsqueeze(0) if blocked is None else blocked.items(trie)
        likeliest = logits[:, 0].masked_fill(is_barred[:, : logits.shape[-1]], NEG_INF)
        items = stable_topk(likeliest, None, min(best, likeliest.shape[1]))
        named = Best(items, logits[:, 0].gather(1, items) - log_partition[:, :1])
    return DenseScore(states, log_partition, named)


def _by_index(runtime: Runtime, index: ItemIndex, states: torch.Tensor, best: int) -> DenseScore:
    batch, paths, width = states.shape
    queries = states.reshape(-1, width) * width**-0.5  # (B * P, D)
    rows, logits = index.search(queries, max(BEST, best), runtime.vectors_of)
    column = torch.searchsorted(runtime.sampled_items, rows).clamp(max=len(runtime.sampled_items) - 1)
    is_sampled = runtime.sampled_items.take(column) == rows
    sampled = queries @ runtime.item_sample.T
    others, of_sample = index.items - (rows >= 0).sum(1), sampled.shape[1] - is_sampled.sum(1)
    stands_for = (others / of_sample.clamp(min=1)).log()  # how many, each of the sample
    terms = torch.cat([sampled + stands_for[:, None], logits, logits.new_full((len(logits), 1), NEG_INF)], 1)
    # An item that is named leaves the sample; -inf for all others goes to a column that is none.
    spare = terms.shape[1] - 1
    log_partition = terms.scatter(1, column.masked_fill(~is_sampled, spare), NEG_INF).logsumexp(1).view(batch, paths)
    named = None
    if best:
        items, likeliest = (part.view(batch, paths, -1)[:, 0] for part in (rows, logits))
        named = Best(items.masked_fill(items < 0, NO_ITEM), likeliest - log_partition[:, :1])
    return DenseScore(states, log_partition, named)
