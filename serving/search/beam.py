"""The constrained beam search: l reasoning tokens, then an item's tokens, only paths that lead to permitted items.

One program of tensors whose shapes depend on (B, beams, steps, S) alone; no decision is taken on the host, so that it
can be recorded whole (`serving/search/cuda_graph.py`). It knows nothing of HTTP, caches or data sets. What an answer
is, is defined here and nowhere else: evaluation, rollouts and the service all call `search`;
`serving/reference.py` says it slowly.

    score(item) = merge over the P reasoning paths of [ log share(path) + log P(c_1 | path) ]
                + sum_{j=2..M} log P(c_j | best path for c_1, c_1 .. c_{j-1})  +  dense_weight * dense(item | s_L)
                + prior(item)

log P is a log_softmax(logits / temperature) over the whole vocabulary. Tokens outside the trie have probability zero in
the search (masked before top-k), not in the normalisation. A path's share is its probability among the kept paths; a
single path has share 1 and adds nothing: its item scores are the sum over the item's tokens. The prior is whatever the
caller knows of items beside the network (`serving/items/neighbours.py`).

All reasoning paths stand at the root when they are done. They are merged there, for every first token, and the path
that likes that token best carries on with it: from then on every beam stands at a node of its own, duplicates never
take a slot, and several paths cost little more than one [open: the paper keeps whole beams over reasoning and items].

Equal scores are ordered by token path, the smaller first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.items.rules import Blocked
from serving.items.trie import Trie
from serving.items.vocabulary import Vocabulary
from serving.network.model import KeysValues, Memory
from serving.network.runtime import Runtime
from serving.types import Beams, BundleSettings, Merge, SearchSettings

NEG_INF = float("-inf")


def search_settings(vocabulary: Vocabulary, settings: BundleSettings) -> SearchSettings:
    """What the search needs of a bundle, also while there is no bundle yet."""
    return SearchSettings(
        start_tokens=tuple(vocabulary.start_tokens),
        reasoning_range=vocabulary.reasoning_range,
        temperature=settings.temperature,
        paths=settings.paths,
        merge=settings.merge,
        dense_candidates=settings.dense_candidates,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """The decoder rows that a search has written, and which of them the newest ones continue.

    unseen (B, Q, W) float: 0 for those of the W slots that are a row's own prefix (itself included), -inf for all
    others, so that no cache entry is ever moved. distance (W,) int64: how many positions before the newest rows.
    """

    past: KeysValues
    unseen: torch.Tensor
    distance: torch.Tensor

    def follow(self, parent: torch.Tensor) -> Rows:
        """Rows that continue `parent` (B, Q'): they inherit its prefix; nothing written is moved."""
        return Rows(self.past, _rows(self.unseen, parent), self.distance)


@dataclass(frozen=True, slots=True)
class Reasoned:
    """The reasoning paths at their last step: logits (B, P, V), scores (B, P), states (B, P, L + 1, D), (B, P, L)."""

    rows: Rows
    logits: torch.Tensor
    scores: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """Items with the score of their tokens: leaf (B, K), scores (B, K), path (B, K), token_log_probs (B, K, M)."""

    leaf: torch.Tensor
    scores: torch.Tensor
    path: torch.Tensor
    token_log_probs: torch.Tensor


def search(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    *,
    steps: int,
    beam_width: int,
    blocked: Blocked | None = None,
    dense_weight: torch.Tensor | None = None,
    prior: torch.Tensor | None = None,
) -> Beams:
    """The best `beam_width` items for each of B histories.

    blocked: nodes without a permitted item, or None. dense_weight: (B,) float, or None for no dense score at all.
    prior: (B, I) float32, added to the items' scores, zeros for requests without one; or None for nobody.
    If K permitted items exist, K come back; if fewer, all of them, and the rest is -1.
    """
    reasoned = reason(runtime, settings, memory, steps)
    return find_items(runtime, trie, settings, memory, reasoned, beam_width, blocked, dense_weight, prior)


def reason(runtime: Runtime, settings: SearchSettings, memory: Memory, steps: int) -> Reasoned:
    """Thinks: the start token of `steps`, then that many steps, keeping the `settings.paths` likeliest paths."""
    batch, device = memory.mask.shape[0], runtime.device
    start = torch.full((batch, 1), settings.start_tokens[steps], dtype=torch.int64, device=device)
    hidden, logits, rows = advance(runtime, memory, None, runtime.embed(start))
    scores = hidden.new_zeros(batch, 1)
    hidden_sum, states = hidden, runtime.state(hidden).unsqueeze(2)  # (B, 1, D), (B, 1, 1, D)
    tokens = torch.zeros(batch, 1, 0, dtype=torch.int64, device=device)
    log_probs = hidden.new_zeros(batch, 1, 0)
    lo, hi = settings.reasoning_range
    for _ in range(steps):
        if runtime.step_form == "state":  # a fed-back state alone has no token to choose, and so a single path
            token = torch.zeros_like(start)
        else:
            step = _log_probs(logits, settings.temperature)[..., lo:hi]  # (B, P, R)
            candidates = (scores.unsqueeze(-1) + step).flatten(1)
            flat = best(candidates, None, min(settings.paths, candidates.shape[1]))  # (B, P')
            scores, parent, token = candidates.gather(1, flat), flat // (hi - lo), flat % (hi - lo) + lo
            rows, hidden_sum, states = rows.follow(parent), _rows(hidden_sum, parent), _rows(states, parent)
            tokens = torch.cat([_rows(tokens, parent), token.unsqueeze(-1)], -1)
            log_probs = torch.cat([_rows(log_probs, parent), step.flatten(1).gather(1, flat).unsqueeze(-1)], -1)
        hidden, logits, rows = advance(runtime, memory, rows, runtime.step_input(token, states[:, :, -1]))
        hidden_sum = hidden_sum + hidden
        states = torch.cat([states, runtime.state(hidden_sum).unsqueeze(2)], 2)
    return Reasoned(rows, logits, scores, states, tokens, log_probs)


def find_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    reasoned: Reasoned,
    beam_width: int,
    blocked: Blocked | None,
    dense_weight: torch.Tensor | None,
    prior: torch.Tensor | None = None,
) -> Beams:
    """Answers: walks the trie with `beam_width` beams; joins dense score, prior and their best items, if asked to."""
    found = _walk(runtime, trie, settings, memory, reasoned, beam_width, blocked)
    dense = torch.zeros_like(found.scores)
    if dense_weight is not None or prior is not None:
        dense_of_items = None if dense_weight is None else runtime.dense(reasoned.states[:, :, -1])  # (B, P, I)
        if settings.dense_candidates:
            liked = _liked(dense_of_items, dense_weight, prior)
            found = _add_best(runtime, trie, settings, memory, reasoned, found, blocked, liked)
        item, scores, dense = trie.item[found.leaf].long(), found.scores, torch.zeros_like(found.scores)
        if dense_of_items is not None and dense_weight is not None:
            dense = dense_of_items.flatten(1).gather(1, found.path * dense_of_items.shape[-1] + item)
            scores = scores + dense_weight[:, None] * dense
        if prior is not None:
            scores = scores + prior.gather(1, item)
        order = best(scores, found.leaf, min(beam_width, scores.shape[1]))
        dense = dense.gather(1, order)
        found = Found(
            found.leaf.gather(1, order),
            scores.gather(1, order),
            found.path.gather(1, order),
            _rows(found.token_log_probs, order),
        )
    return Beams(
        items=trie.item[found.leaf].long().masked_fill(found.scores == NEG_INF, -1),
        scores=found.scores,
        states=reasoned.states,
        reasoning_tokens=reasoned.tokens,
        reasoning_log_probs=reasoned.log_probs,
        path=found.path,
        token_log_probs=found.token_log_probs,
        dense=dense,
    )


def _walk(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    reasoned: Reasoned,
    beam_width: int,
    blocked: Blocked | None,
) -> Found:
    """The beam over item tokens, from the root to the leaves, best first."""
    rows, logits = reasoned.rows, reasoned.logits
    scores = reasoned.scores.log_softmax(-1)  # (B, P): the shares
    node = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    path = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    token_log_probs = scores.new_zeros(*scores.shape, 0)
    for level in range(trie.levels):
        log_probs = _log_probs(logits, settings.temperature)
        if blocked is None:
            step, child = trie.expand(log_probs, node, level)  # (B, Q, C)
        else:
            step, child = blocked.expand(trie, log_probs, node, level)
        candidates = scores.unsqueeze(-1) + step
        count = min(beam_width, trie.nodes_at(level + 1), child.shape[1] * child.shape[2])
        if level == 0:
            scores, parent, place = _merge(candidates, settings.merge, child, min(count, child.shape[2]))
            flat = parent * child.shape[2] + place
        else:
            flat = best(candidates.flatten(1), child.flatten(1), count)  # (B, K)
            scores, parent = candidates.flatten(1).gather(1, flat), flat // child.shape[2]
        node = child.flatten(1).gather(1, flat).long()
        path = path.gather(1, parent)
        chosen = step.flatten(1).gather(1, flat).unsqueeze(-1)
        token_log_probs = torch.cat([_rows(token_log_probs, parent), chosen], -1)
        if level + 1 < trie.levels:
            rows = rows.follow(parent)
            _, logits, rows = advance(runtime, memory, rows, runtime.embed(trie.token[node]))
    return Found(node - trie.level_start[trie.levels], scores, path, token_log_probs)


def _merge(
    candidates: torch.Tensor, merge: Merge, child: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins what all paths say of each first token. Shape: (B, P, C) -> scores, best path, place among C, (B, K)."""
    parent = candidates.argmax(1)  # (B, C)
    merged = candidates.logsumexp(1) if merge == "logsumexp" and candidates.shape[1] > 1 else candidates.amax(1)
    place = best(merged, child[:, 0], count)
    return merged.gather(1, place), parent.gather(1, place), place


def _liked(
    dense_of_items: torch.Tensor | None, dense_weight: torch.Tensor | None, prior: torch.Tensor | None
) -> torch.Tensor:
    """What is added to an item on the likeliest path. Shape: (B, I)."""
    if dense_of_items is None or dense_weight is None:
        assert prior is not None
        return prior
    dense = dense_weight[:, None] * dense_of_items[:, 0]
    return dense if prior is None else dense + prior


def _add_best(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    memory: Memory,
    reasoned: Reasoned,
    found: Found,
    blocked: Blocked | None,
    liked: torch.Tensor,
) -> Found:
    """Scores the best permitted items by `liked` (B, I) with the decoder, on the likeliest path, and appends them.

    A request with zeros alone asked for nothing to be added: its answer is the beam's, whoever shares the batch. One
    pass over the tokens of all U candidates: row (u, j) sees the reasoning and its own item's tokens up to c_j.
    """
    batch, levels = found.leaf.shape[0], trie.levels
    wanted = (liked != 0).any(1)
    if blocked is not None:
        liked = liked.masked_fill(blocked.items(trie), NEG_INF)
    item = best(liked, None, min(settings.dense_candidates, liked.shape[1]))  # (B, U)
    leaf, tokens, count = trie.leaf[item].long(), runtime.item_tokens[item], item.shape[1]  # (B, U), (B, U, M)
    rows, logits = reasoned.rows, reasoned.logits[:, :1].unsqueeze(2).expand(-1, count, -1, -1)  # (B, U, 1, V)
    if levels > 1:
        place = torch.arange(levels - 1, device=leaf.device).repeat(count)  # of a row in its item's chain
        distance = torch.cat([rows.distance + 1 + place[:, None], (place[:, None] - place).clamp(min=0)], 1)
        chain = torch.ones(levels - 1, levels - 1, dtype=torch.bool, device=leaf.device).tril()
        own = torch.block_diag(*[chain] * count)
        own = rows.unseen.new_zeros(own.shape).masked_fill(~own, NEG_INF).expand(batch, -1, -1)
        unseen = torch.cat([rows.unseen[:, :1].expand(-1, len(place), -1), own], -1)
        bias = runtime.relative_bias[:, distance] + unseen.unsqueeze(1)
        x = runtime.embed(tokens[:, :, :-1].flatten(1))
        _, after, _ = runtime.step(x, bias, memory, rows.past)
        logits = torch.cat([logits, after.unflatten(1, (count, levels - 1))], 2)  # (B, U, M, V)
    token_log_probs = _log_probs(logits, settings.temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    scores = token_log_probs.sum(-1) + reasoned.scores.log_softmax(-1)[:, :1]
    scores = scores.masked_fill(liked.gather(1, item) == NEG_INF, NEG_INF)
    twice = (leaf.unsqueeze(2) == found.leaf.unsqueeze(1)) & (found.scores > NEG_INF).unsqueeze(1)  # (B, U, K)
    scores = scores.masked_fill(twice.any(2) | ~wanted[:, None], NEG_INF)
    return Found(
        torch.cat([found.leaf, leaf], 1),
        torch.cat([found.scores, scores], 1),
        torch.cat([found.path, torch.zeros_like(leaf)], 1),
        torch.cat([found.token_log_probs, token_log_probs], 1),
    )


def advance(
    runtime: Runtime, memory: Memory, rows: Rows | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Runs the decoder one position further for every row. Shape: x (B, Q, D) -> hidden (B, Q, D), logits (B, Q, V)."""
    batch, count, _ = x.shape
    unseen = x.new_full((count, count), NEG_INF).fill_diagonal_(0).expand(batch, -1, -1)
    distance = torch.zeros(count, dtype=torch.int64, device=x.device)
    if rows is not None:
        unseen, distance = torch.cat([rows.unseen, unseen], -1), torch.cat([rows.distance + 1, distance])
    # A sum of what is unseen and the relative bias: to choose between them takes several times as long.
    bias = runtime.relative_bias[:, distance].unsqueeze(1) + unseen.unsqueeze(1)  # (B, H, Q, W)
    hidden, logits, past = runtime.step(x, bias, memory, rows.past if rows is not None else None)
    return hidden, logits, Rows(past, unseen, distance)


def _log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks rows per request. Shapes: (B, Q, ...), (B, Q') -> (B, Q', ...)."""
    if tensor.shape[1] == 1:  # nothing to choose
        return tensor.expand(-1, index.shape[1], *[-1] * (tensor.dim() - 2))
    return tensor.gather(1, index.reshape(*index.shape, *([1] * (tensor.dim() - 2))).expand(-1, -1, *tensor.shape[2:]))


def best(scores: torch.Tensor, rank: torch.Tensor | None, count: int) -> torch.Tensor:
    """Places of the best `count` scores, best first, equal ones by ascending rank. Shape: (B, n) -> (B, count).

    rank: (B, n) integers below 2^31, or None for the place itself. topk alone leaves open which of two equal scores
    comes first, and whether both come at all; so it is given one integer per candidate that holds score and rank.
    """
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats, as integers
    if rank is None:
        rank = torch.arange(scores.shape[1], device=scores.device)
    return ((ordered.long() << 32) - rank).topk(count, dim=1).indices
