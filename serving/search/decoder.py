"""The decoder as a search runs it, all rows one position further at a time, and what the search keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues, KeysValues
from serving.types import NEG_INF, SearchSettings


@dataclass(frozen=True, slots=True)
class DecoderCache:
    """Self-attention keys and values of all rows decoded so far, and which of them the newest rows continue.

    attention_mask: (B, Q, W) float, 0 for the slots that are a row's prefix or the row itself, -inf for all others:
    beams are chosen by their mask, and no cache entry is ever moved. distance: (W,) int64, how many positions a slot
    is before the newest rows. past: None before the first pass.
    """

    past: KeysValues | None
    attention_mask: torch.Tensor
    distance: torch.Tensor

    def select(self, parent: torch.Tensor) -> DecoderCache:
        """The cache for rows that continue the rows `parent` (B, Q')."""
        return DecoderCache(self.past, select_rows(self.attention_mask, parent), self.distance)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Items whose tokens were decoded along with the last step of reasoning.

    items: (B, U) int64 catalogue rows, or `NO_ITEM`. later: (B, U, M - 1), log P of their tokens but the first.
    """

    items: torch.Tensor
    later: torch.Tensor


@dataclass(frozen=True, slots=True)
class ReasoningPaths:
    """The reasoning paths at their last step, the likeliest first.

    first_log_probs: (B, P, C), log P of an item's first token. scores: (B, P), log-probability of the path. states:
    (B, P, L + 1, D). tokens, log_probs: (B, P, L). ahead: None if no items were named before.
    """

    cache: DecoderCache
    first_log_probs: torch.Tensor
    scores: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    ahead: Ahead | None = None


@dataclass(frozen=True, slots=True)
class DecodedItems:
    """Items as leaves of the trie, with the reasoning path that each continues, and what its tokens score.

    Shapes: leaf, path (B, K) int64, scores (B, K) float32, -inf where there is no item, token_log_probs (B, K, M).
    """

    leaf: torch.Tensor
    scores: torch.Tensor
    path: torch.Tensor
    token_log_probs: torch.Tensor


def decode_step(
    runtime: Runtime, cross: CrossKeysValues, cache: DecoderCache | None, x: torch.Tensor
) -> tuple[torch.Tensor, DecoderCache]:
    """Decodes one more position of every row. Shapes: x (B, Q, D) -> hidden (B, Q, D)."""
    batch, count, _ = x.shape
    attention_mask = x.new_full((count, count), NEG_INF).fill_diagonal_(0).expand(batch, -1, -1)
    distance = torch.zeros(count, dtype=torch.int64, device=x.device)
    if cache is not None:
        attention_mask = torch.cat([cache.attention_mask, attention_mask], -1)
        distance = torch.cat([cache.distance + 1, distance])
    # Adding the mask to the relative bias takes a fraction of the time that choosing between them does.
    bias = runtime.relative_bias.index_select(1, distance).unsqueeze(1) + attention_mask.unsqueeze(1)  # (B, H, Q, W)
    hidden, past = runtime.step(x, bias, cross, cache.past if cache is not None else None)
    return hidden, DecoderCache(past, attention_mask, distance)


def token_log_probs(
    runtime: Runtime, settings: SearchSettings, hidden: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """log P of the ids that may come next, those of `block`: normalised over them, or over the whole vocabulary.

    Shape: (..., D) -> (..., C).
    """
    first, end = block
    if settings.normalise == "block":
        return _log_softmax(runtime.logits(hidden, block), settings.temperature)
    return _log_softmax(runtime.logits(hidden), settings.temperature)[..., first:end]


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def select_rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks rows per request. Shapes: (B, Q, ...), (B, Q') -> (B, Q', ...)."""
    if tensor.shape[1] == 1:  # nothing to choose
        return tensor if index.shape[1] == 1 else tensor.expand(-1, index.shape[1], *[-1] * (tensor.dim() - 2))
    return tensor.gather(1, index.reshape(*index.shape, *([1] * (tensor.dim() - 2))).expand(-1, -1, *tensor.shape[2:]))


def stable_topk(scores: torch.Tensor, tie_break: torch.Tensor | None, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores, highest first, equal ones by ascending tie_break. Shape: (B, n) float32.

    tie_break: (B, n) integers below 2^31, or None for the index itself. torch.topk leaves open which of two equal
    scores comes first, and whether both come at all; so it is given one integer per candidate that holds both.
    """
    if tie_break is None:
        if count == 1:  # a single path of reasoning: argmax names the first of equal ones, in one operation
            return scores.argmax(1, keepdim=True)
        tie_break = torch.arange(scores.shape[1], device=scores.device)
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats, as integers
    return ((ordered.long() << 32) - tie_break).topk(count, dim=1).indices
