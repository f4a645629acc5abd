"""Items that dense score and neighbours favour most: scored by the decoder too, and added to those the beam has found.

The beam sees token probabilities alone; an item with a low-probability prefix and a high dense or neighbour score would
never be found by it [open]. Only what a history touches and the best by dense score can be favoured: the rest of the
catalogue is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.blocked import Blocked
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.decoder import NEG_INF, DecodedItems, ReasoningPaths, stable_topk, token_log_probs
from serving.search.dense import DenseScore
from serving.search.memory import MemoryScores, find_rows
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
    runtime: Runtime, dense: DenseScore | None, dense_weight: torch.Tensor | None, memory: MemoryScores | None
) -> Favoured:
    """What a memory touches, and the best by dense score. One of the two has to be there. Shape: dense_weight (B,)."""
    items, bonus = [], []
    last = len(runtime.item_tokens) - 1
    if memory is not None:
        own = memory.scores
        if memory.gate is None and dense is not None and dense_weight is not None:
            own = own + dense_weight[:, None] * dense.of(runtime, memory.items.clamp(max=last))
        items.append(memory.items.clamp(max=last))
        bonus.append(own.masked_fill(memory.items == NO_ITEM, NEG_INF))
    if dense is not None and dense_weight is not None:
        own = dense_weight[:, None] * dense.of(runtime, dense.best.clamp(max=last))
        left_out = (dense.best == NO_ITEM) | (dense_weight == 0)[:, None]
        if memory is not None and memory.gate is None:
            elsewhere, is_touched = memory.of(dense.best)
            own, left_out = own + elsewhere, left_out | is_touched
        elif memory is not None and memory.gate is not None:
            left_out = left_out | memory.gate[:, None].isfinite()
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
    """Appends the U permitted items with the highest bonus that the beam has not found, scored by the decoder on the
    likeliest path.

    Nothing is added to a request for which nothing is favoured: its answer is the beam's, whatever else is in the
    batch. Of equal bonuses the lower catalogue row comes first. The decoder's work is in proportion to U.
    """
    items = favours.items
    by_beam = trie.item[found.leaf].long().masked_fill(found.scores == NEG_INF, -1).sort(1).values
    bonus = favours.bonus.masked_fill(find_rows(by_beam, items)[1], NEG_INF)
    bonus = bonus.masked_fill(trie.leaf[items] < 0 if blocked is None else blocked.items(trie, items), NEG_INF)
    chosen = stable_topk(bonus, items, min(settings.dense_candidates, bonus.shape[1]))
    item = items.gather(1, chosen)  # (B, U)
    leaf, tokens = trie.leaf[item].long(), runtime.item_tokens[item]  # (B, U), (B, U, M)
    log_probs = _log_probs(runtime, settings, cross, reasoned, tokens)  # (B, U, M)
    scores = log_probs.sum(-1) + reasoned.scores.log_softmax(-1)[:, :1]
    scores = scores.masked_fill(bonus.gather(1, chosen) == NEG_INF, NEG_INF)
    return DecodedItems(
        torch.cat([found.leaf, leaf], 1),
        torch.cat([found.scores, scores], 1),
        torch.cat([found.path, torch.zeros_like(leaf)], 1),
        torch.cat([found.token_log_probs, log_probs], 1),
    )


def _log_probs(
    runtime: Runtime, settings: SearchSettings, cross: CrossKeysValues, reasoned: ReasoningPaths, tokens: torch.Tensor
) -> torch.Tensor:
    """log P of the tokens of items after the likeliest path. Shape: tokens (B, U, M) -> (B, U, M)."""
    hidden = _hidden(runtime, cross, reasoned, tokens)
    found = []
    for level, block in enumerate(settings.level_ranges):
        log_probs = token_log_probs(runtime, settings, hidden[:, :, level], block)
        found.append(log_probs.gather(-1, tokens[..., level, None] - block[0]))
    return torch.cat(found, -1)


def _hidden(runtime: Runtime, cross: CrossKeysValues, reasoned: ReasoningPaths, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder's outputs at every position of items after the likeliest path. Shapes: (B, U, M) -> (B, U, M, D).

    One pass over the tokens of all items: row (u, j) attends to the reasoning and to its own item's tokens up to c_j.
    """
    batch, count, levels = tokens.shape
    cache, hidden = reasoned.cache, reasoned.hidden[:, :1].unsqueeze(2).expand(-1, count, -1, -1)  # (B, U, 1, D)
    if levels == 1:
        return hidden
    row = torch.arange(count * (levels - 1), device=tokens.device)
    candidate, position = row // (levels - 1), row % (levels - 1)
    behind = position[:, None] - position
    distance = torch.cat([cache.distance + 1 + position[:, None], behind.clamp(min=0)], 1)
    is_prefix = (candidate[:, None] == candidate) & (behind >= 0)
    own_mask = cache.attention_mask.new_zeros(behind.shape).masked_fill(~is_prefix, NEG_INF)
    reasoning_mask = cache.attention_mask[:, :1].expand(-1, len(row), -1)
    attention_mask = torch.cat([reasoning_mask, own_mask.expand(batch, -1, -1)], -1)
    bias = runtime.relative_bias[:, distance] + attention_mask.unsqueeze(1)
    rest, _ = runtime.step(runtime.embed(tokens[:, :, :-1].flatten(1)), bias, cross, cache.past)
    return torch.cat([hidden, rest.view(batch, count, levels - 1, -1)], 2)
