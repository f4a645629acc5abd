"""What the beam would score given items, were it wide enough to reach them. Nothing is searched.

All paths are at the root of the trie and merged there, as in `serving/search/beam.py`; an item's other tokens follow
from the path that carries its first one. The decoder's work is in proportion to the items, not to their square: AT_ONCE
of them share one pass, in which a row attends to its path's reasoning and to its own item's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.decoder import NEG_INF, DecodedItems, ReasoningPaths, select_rows, token_log_probs
from serving.types import Merge, SearchSettings

AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class GivenItems:
    """U items of each request, of which j tokens have been scored.

    tokens: (B, U, M) int64. scored: as `DecodedItems`, with the scores so far, and j token_log_probs. parent: (B, U)
    int64, the decoder's rows that they continue.
    """

    tokens: torch.Tensor
    scored: DecodedItems
    parent: torch.Tensor

    def longer(self, log_probs: torch.Tensor, first_id: int) -> GivenItems:
        """With one more token scored, by the last U of Q rows.

        Shape: log_probs (B, Q, C), of the ids first_id .. first_id + C - 1.
        """
        scored, (batch, rows, _), count = self.scored, log_probs.shape, self.tokens.shape[1]
        column = self.tokens[..., scored.token_log_probs.shape[-1], None] - first_id
        chosen = log_probs[:, rows - count :].gather(-1, column)
        token_log_probs = torch.cat([scored.token_log_probs, chosen], -1)
        longer = DecodedItems(scored.leaf, scored.scores + chosen[..., 0], scored.path, token_log_probs)
        parent = torch.arange(rows - count, rows, device=log_probs.device).expand(batch, -1)
        return GivenItems(self.tokens, longer, parent)


def given_items(
    runtime: Runtime, trie: Trie, settings: SearchSettings, reasoned: ReasoningPaths, items: torch.Tensor
) -> GivenItems:
    """Items in the order given, with their first tokens scored; -inf for those that are not in the trie.

    Shape: items (B, U) int64 catalogue rows, U > 0, or `NO_ITEM`.
    """
    is_row = items < len(trie.leaf)
    rows = items.clamp(max=len(trie.leaf) - 1)
    leaf, tokens = trie.leaf[rows].long(), runtime.item_tokens[rows]  # (B, U), (B, U, M)
    log_probs = reasoned.first_log_probs  # (B, P, C)
    merged, carrier = merge_paths(reasoned.scores.log_softmax(-1).unsqueeze(-1) + log_probs, settings.merge)
    column = tokens[..., 0] - settings.level_ranges[0][0]
    path = carrier.gather(1, column)
    chosen = log_probs.flatten(1).gather(1, path * log_probs.shape[2] + column).unsqueeze(-1)
    scores = merged.gather(1, column).masked_fill(~is_row | (leaf < 0), NEG_INF)
    return GivenItems(tokens, DecodedItems(leaf.clamp(min=0), scores, path, chosen), path)


def score_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    items: torch.Tensor,
) -> DecodedItems:
    """Items in the order given; -inf for those that are not in the trie, such as `NO_ITEM`.

    Shape: items (B, U) int64 catalogue rows, U > 0.
    """
    given = given_items(runtime, trie, settings, reasoned, items)
    first = given.scored
    parts = zip(torch.split(first.path, AT_ONCE, 1), torch.split(given.tokens, AT_ONCE, 1), strict=True)
    later = torch.cat([_later_log_probs(runtime, settings, cross, reasoned, *part) for part in parts], 1)
    log_probs = torch.cat([first.token_log_probs, later], -1)
    return DecodedItems(first.leaf, first.scores + later.sum(-1), first.path, log_probs)


def merge_paths(candidates: torch.Tensor, merge: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the scores of all paths for each first token, and names the path that carries it on: its best one.

    Shape: (B, P, C) -> scores and path, (B, C) each.
    """
    carrier = candidates.argmax(1)
    merged = candidates.logsumexp(1) if merge == "logsumexp" and candidates.shape[1] > 1 else candidates.amax(1)
    return merged, carrier


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
    later = levels - 1
    if not later:
        return reasoned.scores.new_zeros(batch, count, 0)
    cache, row = reasoned.cache, torch.arange(count * later, device=tokens.device)
    item, position = row // later, row % later
    behind = position[:, None] - position
    distance = torch.cat([cache.distance + 1 + position[:, None], behind.clamp(min=0)], 1)
    is_prefix = (item[:, None] == item) & (behind >= 0)
    own_mask = cache.attention_mask.new_zeros(behind.shape).masked_fill(~is_prefix, NEG_INF)
    reasoning_mask = select_rows(cache.attention_mask, path).repeat_interleave(later, 1)
    attention_mask = torch.cat([reasoning_mask, own_mask.expand(batch, -1, -1)], -1)
    bias = runtime.relative_bias[:, distance] + attention_mask.unsqueeze(1)
    hidden, _ = runtime.step(runtime.embed(tokens[:, :, :-1].flatten(1)), bias, cross, cache.past)
    hidden = hidden.view(batch, count, later, -1)
    of_levels = [
        token_log_probs(runtime, settings, hidden[:, :, level], block).gather(
            -1, tokens[..., level + 1, None] - block[0]
        )
        for level, block in enumerate(settings.level_ranges[1:])
    ]
    return torch.cat(of_levels, -1)
