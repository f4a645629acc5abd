"""The constrained beam search: l reasoning tokens, then an item's tokens, along paths to permitted items only.

One tensor program whose shapes depend on (B, beams, steps, S) alone, with no decision on the host, so that it can be
captured whole as one CUDA graph (`serving/search/cuda_graph.py`). It knows nothing of HTTP, caches or data sets. What
an answer is, is defined here and nowhere else: evaluation and the service both call `search`.
`serving/reference.py` is the same definition in slow, plain Python.

    score(item) = merge over the P reasoning paths of [ log share(path) + log P(c_1 | path) ]
                + sum_{j=2..M} log P(c_j | best path for c_1, c_1 .. c_{j-1})  +  dense_weight * dense(item | s_L)

which the item memory joins as `serving/search/memory.py` says; then a request's boosts are added (log of the factors).

log P is a log_softmax(logits / temperature) over the tokens that may stand at the position: the codes of the item's
level, or the reasoning codes (`normalise: block`); in older bundles over the whole vocabulary. Tokens outside the trie
have probability zero in the search (masked before top-k), not in the normalisation. A path's share is its probability
among the paths kept; a single path has share 1 and adds nothing: its item scores are the sum over the item's tokens.

After the last reasoning step all paths are at the root of the trie. They are merged there, for every first token, and
the path that gives a token the highest probability continues with it: from then on every beam is at a node of its own,
duplicates never take a slot, and several paths cost little more than one [open: the paper keeps whole beams over
reasoning and items].

Equal scores are ordered by token path, the smaller first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.items.blocked import Blocked
from serving.items.boosts import Boosts
from serving.items.trie import Trie
from serving.items.vocabulary import Vocabulary
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.candidates import best_candidates, favoured, known_ahead, with_candidates
from serving.search.decoder import (
    Ahead,
    DecodedItems,
    DecoderCache,
    ReasoningPaths,
    decode_step,
    select_rows,
    stable_topk,
    token_log_probs,
)
from serving.search.dense import DenseScore, dense_score
from serving.search.memory import MemoryScores, mixed
from serving.search.scoring import decode_ahead, merge_paths, score_items
from serving.types import NEG_INF, Beams, BundleSettings, SearchSettings


def search_settings(vocabulary: Vocabulary, settings: BundleSettings) -> SearchSettings:
    """What the search needs of a bundle, also while there is no bundle yet."""
    return SearchSettings(
        start_tokens=tuple(vocabulary.start_tokens),
        reasoning_range=vocabulary.reasoning_range,
        level_ranges=vocabulary.level_ranges,
        temperature=settings.temperature,
        paths=settings.paths,
        merge=settings.merge,
        dense_candidates=settings.dense_candidates,
        normalise=settings.normalise,
        gate=settings.gate,
    )


def search(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    *,
    steps: int,
    beam_width: int,
    blocked: Blocked | None = None,
    dense_weight: torch.Tensor | None = None,
    memory: MemoryScores | None = None,
    boosts: Boosts | None = None,
    on_reasoned: Callable[[], object] = lambda: None,
) -> Beams:
    """The best `beam_width` items for each of B histories. If K permitted items exist, K come back; if fewer, all.

    cross: what the decoder sees of the histories. blocked: nodes without a permitted item; None if all are permitted.
    dense_weight: (B,) float32; None computes no dense score at all. memory, boosts: None if no request has any.
    on_reasoned: called between the reasoning and the items, for whoever times them.
    """
    ahead = known_ahead(runtime, trie, settings, blocked, memory, boosts)
    reasoned = reason(runtime, settings, cross, steps, ahead)
    on_reasoned()
    return decode_items(runtime, trie, settings, cross, reasoned, beam_width, blocked, dense_weight, memory, boosts)


def reason(
    runtime: Runtime,
    settings: SearchSettings,
    cross: CrossKeysValues,
    steps: int,
    items: torch.Tensor | None = None,
) -> ReasoningPaths:
    """Decodes the start token of `steps`, then that many steps, keeping the `settings.paths` likeliest paths.

    items: (B, U) catalogue rows that are decoded along with the last step, for a single path. See `known_ahead`.
    """
    batch, device = cross.bias.shape[0], runtime.device

    def decode(
        cache: DecoderCache | None, x: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, DecoderCache, Ahead | None]:
        if items is None or step < steps:
            return *decode_step(runtime, cross, cache, x), None
        return decode_ahead(runtime, settings, cross, cache, x, items)

    start = torch.full((batch, 1), settings.start_tokens[steps], dtype=torch.int64, device=device)
    hidden, cache, ahead = decode(None, runtime.embed(start), 0)
    scores = hidden.new_zeros(batch, 1)
    hidden_sum, states = hidden, runtime.state(hidden).unsqueeze(2)  # (B, 1, D), (B, 1, 1, D)
    tokens = torch.zeros(batch, 1, 0, dtype=torch.int64, device=device)
    log_probs = hidden.new_zeros(batch, 1, 0)
    lo, hi = settings.reasoning_range
    for step in range(steps):
        if runtime.step_form == "state":  # a fed-back state alone has no token to choose, and so a single path
            token = torch.zeros_like(start)
        else:
            next_log_probs = token_log_probs(runtime, settings, hidden, (lo, hi))  # (B, P, hi - lo)
            candidates = (scores.unsqueeze(-1) + next_log_probs).flatten(1)
            flat = stable_topk(candidates, None, min(settings.paths, candidates.shape[1]))  # (B, P')
            scores, parent, token = candidates.gather(1, flat), flat // (hi - lo), flat % (hi - lo) + lo
            cache = cache.select(parent)
            hidden_sum, states = select_rows(hidden_sum, parent), select_rows(states, parent)
            tokens = torch.cat([select_rows(tokens, parent), token.unsqueeze(-1)], -1)
            chosen = next_log_probs.flatten(1).gather(1, flat).unsqueeze(-1)
            log_probs = torch.cat([select_rows(log_probs, parent), chosen], -1)
        hidden, cache, ahead = decode(cache, runtime.step_input(token, states[:, :, -1]), step + 1)
        hidden_sum = hidden_sum + hidden
        states = torch.cat([states, runtime.state(hidden_sum).unsqueeze(2)], 2)
    first_log_probs = token_log_probs(runtime, settings, hidden, settings.level_ranges[0])
    return ReasoningPaths(cache, first_log_probs, scores, states, tokens, log_probs, ahead)


@dataclass(frozen=True, slots=True)
class Proposed:
    """What the beam and the candidates have found, N items a request, before the memory joins and the list is cut.

    network: (B, N), log P with the weighted dense score. dense: (B, N). confidence: (B,), see `serving.types.Gate`;
    zeros where no gate asks for it.
    """

    found: DecodedItems
    network: torch.Tensor
    dense: torch.Tensor
    confidence: torch.Tensor


def decode_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    beam_width: int,
    blocked: Blocked | None,
    dense_weight: torch.Tensor | None,
    memory: MemoryScores | None = None,
    boosts: Boosts | None = None,
) -> Beams:
    """Decodes items with `beam_width` beams, lets dense and memory scores join, and ranks again. See `search`."""
    proposed = propose_items(
        runtime, trie, settings, cross, reasoned, beam_width, blocked, dense_weight, memory, boosts
    )
    is_ranked = dense_weight is None and memory is None  # by the beam, which no other score joins
    return _joined(trie, settings, reasoned, proposed, memory, boosts, None if is_ranked else beam_width)


def rank_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    items: torch.Tensor,
    dense_weight: torch.Tensor | None,
    memory: MemoryScores | None = None,
    boosts: Boosts | None = None,
) -> Beams:
    """All of the given items, best first, with the scores that `search` gives them. K is their number.

    Shape: items (B, U) int64 catalogue rows; those that are not in the trie, such as `NO_ITEM`, come last, as -1.
    """
    found = score_items(runtime, trie, settings, cross, reasoned, items)
    scorer = None
    if dense_weight is not None:
        scorer = dense_score(runtime, trie, reasoned.states[:, :, -1], None, 0)
    proposed = _proposed(runtime, trie, settings, reasoned, found, scorer, dense_weight, memory)
    return _joined(trie, settings, reasoned, proposed, memory, boosts, items.shape[1])


def _joined(
    trie: Trie,
    settings: SearchSettings,
    reasoned: ReasoningPaths,
    proposed: Proposed,
    memory: MemoryScores | None,
    boosts: Boosts | None,
    keep: int | None,
) -> Beams:
    """Lets memory and boosts join what was proposed, and keeps the best, best first. keep: None leaves the order."""
    found, dense, scores = proposed.found, proposed.dense, proposed.network
    gate = torch.full_like(proposed.confidence, float("inf"))
    if memory is not None:
        by_memory, _ = memory.of(trie.item[found.leaf].long())
        if memory.gate is None or settings.gate is None:
            scores = scores + by_memory
        else:
            gate = memory.gate + settings.gate.confidence * proposed.confidence
            scores = mixed(scores, by_memory.log(), gate, settings.gate.network_power, settings.gate.memory_power)
    if boosts is not None:
        scores = scores + boosts.of_leaves(found.leaf)
    if keep is not None:
        order = stable_topk(scores, found.leaf, min(keep, scores.shape[1]))
        dense, scores = dense.gather(1, order), scores.gather(1, order)
        found = DecodedItems(
            found.leaf.gather(1, order), scores, found.path.gather(1, order), select_rows(found.token_log_probs, order)
        )
    return Beams(
        items=trie.item[found.leaf].long().masked_fill(scores == NEG_INF, -1),
        scores=scores,
        states=reasoned.states,
        reasoning_tokens=reasoned.tokens,
        reasoning_log_probs=reasoned.log_probs,
        path=found.path,
        token_log_probs=found.token_log_probs,
        dense=dense,
        gate=gate,
    )


def propose_items(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    beam_width: int,
    blocked: Blocked | None,
    dense_weight: torch.Tensor | None,
    memory: MemoryScores | None,
    boosts: Boosts | None = None,
) -> Proposed:
    """The beam's items and the candidates, with what the network alone says of them. See `search`."""
    scorer, candidates, later = None, None, None
    if dense_weight is not None:
        best = 0 if memory is not None and memory.decides else settings.dense_candidates
        scorer = dense_score(runtime, trie, reasoned.states[:, :, -1], blocked, best)
    if reasoned.ahead is not None:
        candidates, later = reasoned.ahead.items, reasoned.ahead.later
    elif settings.dense_candidates and not (dense_weight is None and memory is None):
        favours = favoured(runtime, scorer, dense_weight, memory, boosts)
        candidates = best_candidates(trie, settings.dense_candidates, blocked, favours)
    found = _decode_tokens(runtime, trie, settings, cross, reasoned, beam_width, blocked, boosts)
    if candidates is not None:
        scored = score_items(runtime, trie, settings, cross, reasoned, candidates, later)
        found = with_candidates(found, scored)
    return _proposed(runtime, trie, settings, reasoned, found, scorer, dense_weight, memory)


def _proposed(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    reasoned: ReasoningPaths,
    found: DecodedItems,
    scorer: DenseScore | None,
    dense_weight: torch.Tensor | None,
    memory: MemoryScores | None,
) -> Proposed:
    network, dense = found.scores, torch.zeros_like(found.scores)
    if scorer is not None and dense_weight is not None:
        dense = scorer.of(runtime, trie.item[found.leaf].long(), found.path)
        network = network + dense_weight[:, None] * dense
    confidence = found.scores.new_zeros(len(found.scores))
    if settings.gate is not None and settings.gate.confidence and memory is not None:
        confidence = reasoned.first_log_probs[:, 0].amax(-1)
    return Proposed(found, network, dense, confidence)


def _decode_tokens(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    cross: CrossKeysValues,
    reasoned: ReasoningPaths,
    beam_width: int,
    blocked: Blocked | None,
    boosts: Boosts | None,
) -> DecodedItems:
    """The beam over item tokens, from the root of the trie to its leaves; best item first, boosts included.

    Boosts decide with the most that they add below a node which beams go on, and are no part of the scores.
    """
    cache, log_probs = reasoned.cache, reasoned.first_log_probs
    scores = reasoned.scores.log_softmax(-1)  # (B, P): the log shares
    node = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    path = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    chosen_log_probs = scores.new_zeros(*scores.shape, 0)
    for level, (first_id, _) in enumerate(settings.level_ranges):
        if blocked is None:
            step, child = trie.expand(log_probs, node, level, first_id=first_id)  # (B, Q, C)
        else:
            step, child = blocked.expand(trie, log_probs, node, level, first_id=first_id)
        candidates = scores.unsqueeze(-1) + step
        bound = None if boosts is None else boosts.of_children(child, level)
        count = min(beam_width, trie.nodes_at(level + 1), child.shape[1] * child.shape[2])
        if level == 0:
            merged, carrier = merge_paths(candidates, settings.merge)
            ranked = merged if bound is None else merged + bound[:, 0]
            column = stable_topk(ranked, child[:, 0], min(count, child.shape[2]))
            scores, parent = merged.gather(1, column), carrier.gather(1, column)
            flat = parent * child.shape[2] + column
        else:
            ranked = candidates if bound is None else candidates + bound
            flat = stable_topk(ranked.flatten(1), child.flatten(1), count)  # (B, K)
            scores, parent = candidates.flatten(1).gather(1, flat), flat // child.shape[2]
        node = child.flatten(1).gather(1, flat).long()
        path = path.gather(1, parent)
        chosen = step.flatten(1).gather(1, flat).unsqueeze(-1)
        chosen_log_probs = torch.cat([select_rows(chosen_log_probs, parent), chosen], -1)
        if level + 1 < trie.levels:
            token, block = trie.token[node], settings.level_ranges[level + 1]
            hidden, cache = decode_step(runtime, cross, cache.select(parent), runtime.embed(token))
            log_probs = token_log_probs(runtime, settings, hidden, block)  # (B, K, C)
    return DecodedItems(node - trie.level_start[trie.levels], scores, path, chosen_log_probs)
