"""The constrained beam search: l reasoning tokens, then an item's tokens, only paths that lead to permitted items.

One program of tensors whose shapes depend on (B, beams, steps, S) alone; no decision is taken on the host. It knows
nothing of HTTP, caches or data sets. What an answer is, is defined here and nowhere else: evaluation, rollouts and
the service all call `search`.

    score(item | path) = sum over the item's tokens of log_softmax(logits / temperature) over the whole vocabulary
    score(item) = merge over the kept reasoning paths of
                  [ log share(path) + score(item | path) + dense_weight * dense(item | s_L) ]

A path's share is its probability among the kept paths; a single path has share 1 and adds nothing.

Tokens outside the trie have probability zero in the search (masked before top-k), not in the normalisation. Every
reasoning path fans out to its own K beams, so duplicates across paths never cost an item. Ties go to the smaller
token path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.model import KeysValues, Memory
from serving.runtimes.base import Runtime
from serving.trie import Trie
from serving.types import Beams, Merge

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What of a bundle the search needs. start_tokens[l] opens a search with l steps; reasoning_range is [lo, hi)."""

    start_tokens: tuple[int, ...]
    reasoning_range: tuple[int, int]
    temperature: float = 1.0
    paths: int = 1
    merge: Merge = "logsumexp"


@dataclass(slots=True)
class Rows:
    """The decoder rows of a search at one position, P or P * K per request, and all they have seen.

    hidden (B, Q, D) and logits (B, Q, V) of the newest position. ancestors (B, Q, W) bool: which of the W slots written
    so far are a row's own prefix, so that no cache entry is ever moved. positions: the position of every slot.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    past: KeysValues | None
    ancestors: torch.Tensor
    positions: list[int]


@dataclass(frozen=True, slots=True)
class Reasoned:
    """The reasoning paths: rows at their last step, scores (B, P), states (B, P, l + 1, D), the rest (B, P, l)."""

    rows: Rows
    scores: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor


def search(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    *,
    steps: int,
    beam_width: int,
    blocked: torch.Tensor | None = None,
    dense_weight: torch.Tensor | None = None,
) -> Beams:
    """The best `beam_width` items for each of B histories.

    blocked: (B, N) bool, nodes without a permitted item, or None. dense_weight: (B,) float, or None for no dense score.
    If K permitted items exist, K come back; if fewer, all of them, and the rest is -1.
    """
    reasoned = reason(runtime, settings, memory, steps)
    return find_items(runtime, trie, settings, memory, reasoned, beam_width, blocked, dense_weight)


def reason(runtime: Runtime, settings: SearchSettings, memory: Memory, steps: int) -> Reasoned:
    """Thinks: the start token of `steps`, then that many steps, keeping the `settings.paths` likeliest paths."""
    batch, device = memory.mask.shape[0], runtime.device
    start = torch.full((batch, 1), settings.start_tokens[steps], dtype=torch.int64, device=device)
    rows = _advance(runtime, memory, None, runtime.embed(start))
    width = rows.hidden.shape[-1]
    scores = torch.zeros(batch, 1, device=device)
    hidden_sum = rows.hidden
    states = runtime.state(hidden_sum).unsqueeze(2)  # (B, 1, 1, D)
    tokens = torch.zeros(batch, 1, 0, dtype=torch.int64, device=device)
    log_probs = torch.zeros(batch, 1, 0, device=device)
    lo, hi = settings.reasoning_range
    branching = runtime.step_form != "state"  # a fed-back state alone has no token to choose
    for _ in range(steps):
        if branching:
            step = (rows.logits / settings.temperature).log_softmax(-1)[..., lo:hi]  # (B, P, R)
            paths = min(settings.paths, step.shape[1] * step.shape[2])
            scores, flat = _top(scores.unsqueeze(-1) + step, paths)
            parent, choice = flat // (hi - lo), flat % (hi - lo)
            chosen = step.flatten(1).gather(1, flat)
            rows = _follow(rows, parent)
            hidden_sum, states = _rows(hidden_sum, parent), _rows(states, parent)
            tokens = torch.cat([_rows(tokens, parent), (choice + lo).unsqueeze(-1)], -1)
            log_probs = torch.cat([_rows(log_probs, parent), chosen.unsqueeze(-1)], -1)
            token = choice + lo
        else:
            token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        rows = _advance(runtime, memory, rows, runtime.step_input(token, states[:, :, -1]))
        hidden_sum = hidden_sum + rows.hidden
        states = torch.cat([states, runtime.state(hidden_sum).reshape(batch, -1, 1, width)], 2)
    return Reasoned(rows, scores, states, tokens, log_probs)


def find_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    reasoned: Reasoned,
    beam_width: int,
    blocked: torch.Tensor | None,
    dense_weight: torch.Tensor | None,
) -> Beams:
    """Answers: walks the trie from every reasoning path with `beam_width` beams, then merges equal items."""
    rows, scores = reasoned.rows, reasoned.scores.log_softmax(-1)
    batch, paths = scores.shape
    node = torch.zeros(batch, paths, 1, dtype=torch.int64, device=scores.device)
    scores = scores.unsqueeze(-1)  # (B, P, K)
    token_log_probs = scores.new_zeros(batch, paths, 1, 0)
    for level in range(trie.levels):
        log_probs = (rows.logits / settings.temperature).log_softmax(-1).unflatten(1, (paths, -1))  # (B, P, K, V)
        child, exists = trie.children(node, level)  # (B, P, K, C)
        if blocked is not None:
            exists = exists & ~blocked.gather(1, child.flatten(1)).view_as(child)
        step = log_probs.gather(-1, trie.token[child])
        candidates = (scores.unsqueeze(-1) + step).masked_fill(~exists, NEG_INF)
        keep = min(beam_width, trie.nodes_at(level + 1), candidates[0, 0].numel())
        scores, flat = _top(candidates.flatten(0, 1), keep)  # (B * P, K')
        scores, flat = scores.unflatten(0, (batch, paths)), flat.unflatten(0, (batch, paths))
        parent = flat // child.shape[-1]
        node = child.flatten(2).gather(2, flat)
        chosen = step.flatten(2).gather(2, flat).unsqueeze(-1)
        earlier = token_log_probs.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, token_log_probs.shape[-1]))
        token_log_probs = torch.cat([earlier, chosen], -1)
        if level + 1 < trie.levels:
            width = rows.hidden.shape[1] // paths
            in_batch = parent + torch.arange(paths, device=node.device)[None, :, None] * width
            rows = _follow(rows, in_batch.flatten(1))
            rows = _advance(runtime, memory, rows, runtime.embed(trie.token[node].flatten(1)))
    leaf = node - trie.level_start[trie.levels]  # (B, P, K)
    item = trie.item[leaf]
    dense = torch.zeros_like(scores)
    if dense_weight is not None:
        dense = runtime.dense(reasoned.states[:, :, -1]).gather(-1, item)
        scores = scores + dense_weight[:, None, None] * dense
    return _merge(settings.merge, trie, reasoned, leaf, scores, token_log_probs, dense, beam_width)


def _merge(
    merge: Merge,
    trie: Trie,
    reasoned: Reasoned,
    leaf: torch.Tensor,
    scores: torch.Tensor,
    token_log_probs: torch.Tensor,
    dense: torch.Tensor,
    beam_width: int,
) -> Beams:
    """One entry per item: its best path stands for it, its score is the merge over all its paths."""
    paths = leaf.shape[1]
    path = torch.arange(paths, device=leaf.device)[None, :, None].expand_as(leaf).flatten(1)
    leaf, scores, dense = leaf.flatten(1), scores.flatten(1), dense.flatten(1)
    token_log_probs = token_log_probs.flatten(1, 2)
    if paths > 1:
        same = leaf.unsqueeze(2) == leaf.unsqueeze(1)  # (B, PK, PK)
        other = torch.where(same, scores.unsqueeze(1), NEG_INF)
        place = torch.arange(leaf.shape[1], device=leaf.device)
        better = same & (
            (other > scores.unsqueeze(2)) | ((other == scores.unsqueeze(2)) & (place[None, :] < place[:, None]))
        )
        scores = (other.logsumexp(2) if merge == "logsumexp" else other.amax(2)).masked_fill(better.any(2), NEG_INF)
    by_path = leaf.argsort(-1)  # the token order: what a stable sort by score leaves in place among equals
    order = by_path.gather(1, scores.gather(1, by_path).argsort(dim=-1, descending=True, stable=True))[:, :beam_width]
    scores = scores.gather(1, order)
    items = trie.item[leaf.gather(1, order)].masked_fill(scores == NEG_INF, -1)
    return Beams(
        items=items,
        scores=scores,
        states=reasoned.states,
        reasoning_tokens=reasoned.tokens,
        reasoning_log_probs=reasoned.log_probs,
        path=path.gather(1, order),
        token_log_probs=_rows(token_log_probs, order),
        dense=dense.gather(1, order),
    )


def _advance(runtime: Runtime, memory: Memory, rows: Rows | None, x: torch.Tensor) -> Rows:
    """Runs the decoder one position further for every row. Shape: x (B, Q, D)."""
    batch, count, _ = x.shape
    own = torch.eye(count, dtype=torch.bool, device=x.device).expand(batch, -1, -1)
    if rows is None:
        position, past, ancestors, positions = 0, None, own, [0] * count
    else:
        position = rows.positions[-1] + 1
        past, ancestors = rows.past, torch.cat([rows.ancestors, own], -1)
        positions = rows.positions + [position] * count
    keys = torch.tensor(positions, device=x.device)
    relative = runtime.position_bias(keys[-1:], keys)  # (H, 1, W)
    bias = relative.unsqueeze(0).masked_fill(~ancestors.unsqueeze(1), NEG_INF)  # (B, H, Q, W)
    hidden, logits, past = runtime.step(x, bias, memory, past)
    return Rows(hidden, logits, past, ancestors, positions)


def _follow(rows: Rows, parent: torch.Tensor) -> Rows:
    """The rows that continue `parent` (B, Q'): they inherit its prefix; nothing written is moved."""
    return Rows(
        _rows(rows.hidden, parent), _rows(rows.logits, parent), rows.past, _rows(rows.ancestors, parent), rows.positions
    )


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks rows per request. Shapes: (B, Q, ...), (B, Q') -> (B, Q', ...)."""
    return tensor.gather(1, index.reshape(*index.shape, *([1] * (tensor.dim() - 2))).expand(-1, -1, *tensor.shape[2:]))


def _top(candidates: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` of each request's candidates, best first. Shape: (B, ...) -> values, flat indices (B, count)."""
    values, flat = candidates.flatten(1).topk(count, dim=1)
    return values, flat
