"""Items that dense score and neighbours favour most: scored by the decoder too, and added to those the beam has found.

The beam sees token probabilities alone; an item with a low-probability prefix and a high dense or neighbour score would
never be found by it [open]. Only what a history touches and the best by dense score can be favoured: the rest of the
catalogue is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.blocked import Blocked
from serving.items.boosts import Boosts
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.decoder import NEG_INF, DecodedItems, ReasoningPaths, stable_topk
from serving.search.dense import DenseScore
from serving.search.memory import MemoryScores, find_rows
from serving.search.scoring import score_items
from serving.types import SearchSettings


@dataclass(frozen=True, slots=True)
class Favoured:
    """Items that may be added, C a request, each named once.

    items: (B, C) int64 catalogue rows. bonus: (B, C) float32, what favours an item on the likeliest path: dense and
    memory scores added up, or, where the memory is mixed with the network, its shares alone; -inf for padding.
    """

    items: torch.Tensor
    bonus: torch.Tensor


def favoured(
    runtime: Runtime,
    dense: DenseScore | None,
    dense_weight: torch.Tensor | None,
    memory: MemoryScores | None,
    boosts: Boosts | None = None,
) -> Favoured:
    """What a memory touches, and the best by dense score, boosted. One of the two has to be there.

    Shape: dense_weight (B,)."""
    items, bonus = [], []
    last = len(runtime.item_tokens) - 1
    if memory is not None:
        own = memory.scores
        if memory.gate is None and dense is not None and dense_weight is not None:
            own = own + dense_weight[:, None] * dense.of(runtime, memory.items.clamp(max=last))
        if boosts is not None:
            boost = boosts.of_items(memory.items.clamp(max=last))
            own = own + boost if memory.gate is None else own * boost.exp()
        items.append(memory.items.clamp(max=last))
        bonus.append(own.masked_fill(memory.items > last, NEG_INF))  # padding, and what no index has room for yet
    if dense is not None and dense_weight is not None:
        own = dense_weight[:, None] * dense.of(runtime, dense.best.clamp(max=last))
        left_out = (dense.best == NO_ITEM) | (dense_weight == 0)[:, None]
        if memory is not None and memory.gate is None:
            elsewhere, is_touched = memory.of(dense.best)
            own, left_out = own + elsewhere, left_out | is_touched
        elif memory is not None and memory.gate is not None:
            left_out = left_out | memory.gate[:, None].isfinite()
        if boosts is not None:
            own = own + boosts.of_items(dense.best.clamp(max=last))
        items.append(dense.best.clamp(max=last))
        bonus.append(own.masked_fill(left_out, NEG_INF))
    return Favoured(torch.cat(items, 1), torch.cat(bonus, 1))


def add_candidates(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    found: DecodedItems,
    blocked: Blocked | None,
    favours: Favoured,
) -> DecodedItems:
    """Appends the U permitted items with the highest bonus that the beam has not found, scored as the beam would have.

    Nothing is added to a request for which nothing is favoured: its answer is the beam's, whatever else is in the
    batch. Of equal bonuses the lower catalogue row comes first. The decoder's work is in proportion to U.
    """
    items = favours.items
    by_beam = trie.item[found.leaf].long().masked_fill(found.scores == NEG_INF, -1).sort(1).values
    bonus = favours.bonus.masked_fill(find_rows(by_beam, items)[1], NEG_INF)
    bonus = bonus.masked_fill(trie.leaf[items] < 0 if blocked is None else blocked.items(trie, items), NEG_INF)
    chosen = stable_topk(bonus, items, min(settings.dense_candidates, bonus.shape[1]))
    added = items.gather(1, chosen).masked_fill(bonus.gather(1, chosen) == NEG_INF, NO_ITEM)  # (B, U)
    scored = score_items(runtime, trie, settings, cross, reasoned, added)
    return DecodedItems(
        torch.cat([found.leaf, scored.leaf], 1),
        torch.cat([found.scores, scored.scores], 1),
        torch.cat([found.path, scored.path], 1),
        torch.cat([found.token_log_probs, scored.token_log_probs], 1),
    )
