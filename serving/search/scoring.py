"""What the beam would score given items, were it wide enough to reach them. Nothing is searched.

All paths are at the root of the trie and merged there, as in `serving/search/beam.py`; an item's other tokens follow
from the path that carries its first one. The decoder's work is in proportion to the items, not to their square: AT_ONCE
of them share one pass, in which a row attends to its path's reasoning and to its own item's tokens. Where there is a
single path of reasoning, items that are known before it ends share the pass of its last step.
"""

from __future__ import annotations

import torch

from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues, KeysValues
from serving.search.decoder import (
    Ahead,
    DecodedItems,
    DecoderCache,
    ReasoningPaths,
    select_rows,
    token_log_probs,
)
from serving.types import NEG_INF, Merge, SearchSettings

AT_ONCE = 64


def score_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    items: torch.Tensor,
    later: torch.Tensor | None = None,
) -> DecodedItems:
    """Items in the order given; -inf for those that are not in the trie, such as `NO_ITEM`.

    later: log P of their tokens but the first, where it is known. Shapes: items (B, U) int64 catalogue rows, U > 0,
    later (B, U, M - 1).
    """
    is_row = items < len(trie.leaf)
    rows = items.clamp(max=len(trie.leaf) - 1)
    leaf, tokens = trie.leaf[rows].long(), runtime.item_tokens[rows]  # (B, U), (B, U, M)
    log_probs = reasoned.first_log_probs  # (B, P, C)
    merged, carrier = merge_paths(reasoned.scores.log_softmax(-1).unsqueeze(-1) + log_probs, settings.merge)
    column = tokens[..., 0] - settings.level_ranges[0][0]
    path = carrier.gather(1, column)
    first = log_probs.flatten(1).gather(1, path * log_probs.shape[2] + column).unsqueeze(-1)
    if later is None:
        parts = zip(torch.split(path, AT_ONCE, 1), torch.split(tokens, AT_ONCE, 1), strict=True)
        later = torch.cat([_later_log_probs(runtime, settings, cross, reasoned, *part) for part in parts], 1)
    scores = (merged.gather(1, column) + later.sum(-1)).masked_fill(~is_row | (leaf < 0), NEG_INF)
    return DecodedItems(leaf.clamp(min=0), scores, path, torch.cat([first, later], -1))


def merge_paths(candidates: torch.Tensor, merge: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the scores of all paths for each first token, and names the path that carries it on: its best one.

    Shape: (B, P, C) -> scores and path, (B, C) each.
    """
    carrier = candidates.argmax(1)
    merged = candidates.logsumexp(1) if merge == "logsumexp" and candidates.shape[1] > 1 else candidates.amax(1)
    return merged, carrier


def decode_ahead(
    runtime: Runtime,
    settings: SearchSettings,
    cross: CrossKeysValues,
    cache: DecoderCache | None,
    x: torch.Tensor,
    items: torch.Tensor,
) -> tuple[torch.Tensor, DecoderCache, Ahead]:
    """`decode_step` for the last step of the only path of reasoning, with items that continue it in the same pass.

    The step has one row, for which a CPU reads all weights; with the items' rows it does so no more often. The cache
    keeps nothing of the items. Shapes: x (B, 1, D) -> hidden (B, 1, D), items (B, U) catalogue rows, or `NO_ITEM`.
    """
    tokens = runtime.item_tokens[items.clamp(max=len(runtime.item_tokens) - 1)]  # (B, U, M)
    if cache is None:
        cache = DecoderCache(None, x.new_zeros(len(x), 1, 0), torch.zeros(0, dtype=torch.int64, device=x.device))
    rows = 1 + tokens.shape[1] * (tokens.shape[2] - 1)
    mask = cache.attention_mask.expand(-1, rows, -1)
    hidden, past, later = _decode(runtime, settings, cross, cache, mask, x, tokens)
    slots = len(cache.distance) + 1  # of one sequence, each of which is in the prefix of all that follows
    distance = torch.arange(slots - 1, -1, -1, device=x.device)
    cache = DecoderCache(runtime.first_slots(past, slots), x.new_zeros(len(x), 1, slots), distance)
    return hidden, cache, Ahead(items, later)


def _later_log_probs(
    runtime: Runtime,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    path: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """log P of all tokens of items but the first. Shapes: path (B, U), tokens (B, U, M) -> (B, U, M - 1)."""
    batch, count, levels = tokens.shape
    if levels == 1:
        return reasoned.scores.new_zeros(batch, count, 0)
    mask = select_rows(reasoned.cache.attention_mask, path).repeat(1, levels - 1, 1)
    nothing = reasoned.states.new_zeros(batch, 0, reasoned.states.shape[-1])
    return _decode(runtime, settings, cross, reasoned.cache, mask, nothing, tokens)[2]


def _decode(
    runtime: Runtime,
    settings: SearchSettings,
    cross: CrossKeysValues,
    cache: DecoderCache,
    mask: torch.Tensor,
    x: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, KeysValues, torch.Tensor]:
    """One pass over F = 0 or 1 rows that come next, and behind them over all tokens but the last of U items.

    The items' first tokens come first, then their second ones. mask: what rows see of the cache. Shapes: mask
    (B, F + (M - 1) * U, W), x (B, F, D), tokens (B, U, M) -> hidden (B, F, D), the past with all rows, and log P of the
    tokens but the first (B, U, M - 1).
    """
    (batch, first, _), (_, count, levels) = x.shape, tokens.shape
    row = torch.arange(-first, count * (levels - 1), device=x.device)  # x is row -1, which all items continue
    item, position = row % count, row // count + first
    behind = position[:, None] - position
    is_hidden = (behind < 0) | ((item[:, None] != item) & (row >= 0))
    own_mask = x.new_zeros(behind.shape).masked_fill(is_hidden, NEG_INF)
    distance = torch.cat([cache.distance + 1 + position[:, None], behind.clamp(min=0)], 1)
    attention_mask = torch.cat([mask, own_mask.expand(batch, -1, -1)], -1)
    bias = runtime.relative_bias[:, distance] + attention_mask.unsqueeze(1)
    by_level = tokens.transpose(1, 2)  # (B, M, U)
    rows = torch.cat([x, runtime.embed(by_level[:, :-1].flatten(1))], 1)
    hidden, past = runtime.step(rows, bias, cross, cache.past)
    later = [
        token_log_probs(runtime, settings, of_level, block).gather(-1, token.unsqueeze(-1) - block[0])
        for of_level, token, block in zip(
            torch.split(hidden[:, first:], count, 1), by_level[:, 1:].unbind(1), settings.level_ranges[1:], strict=True
        )
    ]
    return hidden[:, :first], past, torch.cat(later, -1)
