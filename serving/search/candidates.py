"""Items that dense score and neighbours favour most: scored by the decoder too, whether the beam finds them or not.

The beam sees token probabilities alone; an item with a low-probability prefix and a high dense or neighbour score would
never be found by it [open]. Only what a history touches and the best by dense score can be favoured: the rest of the
catalogue is never looked at. What the memory alone chooses is known before any reasoning, and its tokens share the pass
of the last step; other candidates have a pass of their own (`serving/search/scoring.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.blocked import Blocked
from serving.items.boosts import Boosts
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.search.decoder import DecodedItems, stable_topk
from serving.search.dense import DenseScore
from serving.search.memory import MemoryScores
from serving.types import NEG_INF, SearchSettings


@dataclass(frozen=True, slots=True)
class Favoured:
    """Items that may be added, C a request, each named once.

    items: (B, C) int64 catalogue rows, then padding. bonus: (B, C) float32, what favours an item on the likeliest path:
    dense and memory scores added up, or, where the memory is mixed with the network, its shares alone; -inf: padding.
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
        items.append(memory.items)
        bonus.append(own.masked_fill(memory.items > last, NEG_INF))  # padding, and what no index has room for yet
    if dense is not None and dense.best is not None and dense_weight is not None:
        best = dense.best.items
        own = dense_weight[:, None] * dense.best.scores
        left_out = (best == NO_ITEM) | (dense_weight == 0)[:, None]
        if memory is not None and memory.gate is None:
            elsewhere, is_touched = memory.of(best)
            own, left_out = own + elsewhere, left_out | is_touched
        elif memory is not None and memory.gate is not None:
            left_out = left_out | memory.gate[:, None].isfinite()
        if boosts is not None:
            own = own + boosts.of_items(best.clamp(max=last))
        items.append(best)
        bonus.append(own.masked_fill(left_out, NEG_INF))
    return Favoured(*(part[0] if len(part) == 1 else torch.cat(part, 1) for part in (items, bonus)))


def best_candidates(trie: Trie, count: int, blocked: Blocked | None, favours: Favoured) -> torch.Tensor:
    """The `count` permitted items with the highest bonus; of equal ones the lower catalogue row comes first.

    Shape: (B, U) int64 catalogue rows, then NO_ITEM where nothing more is favoured.
    """
    items, bonus = favours.items, favours.bonus
    if blocked is not None and blocked.most is not None and count + blocked.most < items.shape[1]:
        # Enough of these are permitted; to ask of all is to read all over arrays of the catalogue's size.
        best = stable_topk(bonus, items, count + blocked.most)
        items, bonus = items.gather(1, best), bonus.gather(1, best)
    rows = items.clamp(max=len(trie.leaf) - 1)
    is_barred = trie.leaf[rows] < 0 if blocked is None else blocked.items(trie, rows)
    bonus = bonus.masked_fill(is_barred, NEG_INF)
    chosen = stable_topk(bonus, items, min(count, bonus.shape[1]))
    return items.gather(1, chosen).masked_fill(bonus.gather(1, chosen) == NEG_INF, NO_ITEM)


def known_ahead(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    blocked: Blocked | None,
    memory: MemoryScores | None,
    boosts: Boosts | None,
) -> torch.Tensor | None:
    """The candidates, if the memory alone chooses them and all continue one path of reasoning; else None.

    Shape: (B, U), as of `best_candidates`.
    """
    if memory is None or not memory.decides or not settings.dense_candidates or settings.paths > 1 or trie.levels == 1:
        return None
    return best_candidates(trie, settings.dense_candidates, blocked, favoured(runtime, None, None, memory, boosts))


def with_candidates(found: DecodedItems, candidates: DecodedItems) -> DecodedItems:
    """The beam's items, then the candidates, which score -inf where the beam has found them too."""
    by_beam = found.leaf.masked_fill(found.scores == NEG_INF, -1)
    is_found = (candidates.leaf.unsqueeze(2) == by_beam.unsqueeze(1)).any(2)
    return DecodedItems(
        torch.cat([found.leaf, candidates.leaf], 1),
        torch.cat([found.scores, candidates.scores.masked_fill(is_found, NEG_INF)], 1),
        torch.cat([found.path, candidates.path], 1),
        torch.cat([found.token_log_probs, candidates.token_log_probs], 1),
    )
