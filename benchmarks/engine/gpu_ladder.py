"""What makes the search fast on a GPU: a ladder of techniques, each rung adding one to the rung before.

    expanded                as `generate`: a beam is a row of its own, with a copy of the user's cross-attention keys
                            and values, and a cache that is copied when it continues another beam
    shared cross-attention  the beams of a user share one copy
    ancestors               cache entries stay where they are: a mask selects those of a beam's own prefix
    one row first           start token and reasoning take one row per user, not one per beam: `serving.search.beam`
    one graph               all of it captured and launched as one graph: `serving.search.cuda_graph`
    bfloat16                the same with weights and caches in bfloat16 and scores in float32

All rungs but the last find the same items with the same scores. The last rounds differently, which can reorder near
ties, so its answers are compared by overlap. Rungs have one reasoning path, and all compute the states of an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from benchmarks.engine.answers import Paths
from serving.items.trie import Trie
from serving.network.eager import EagerRuntime
from serving.network.model import StreamRec
from serving.network.t5 import T5, CrossKeysValues, KeysValues
from serving.search.beam import decode_items, search
from serving.search.cuda_graph import Capture, GraphSearch
from serving.search.decoder import ReasoningPaths, decode_step, stable_topk, token_log_probs
from serving.types import NEG_INF, Beams, SearchSettings

EXPANDED, SHARED, ANCESTORS, ONE_ROW = "expanded", "shared cross-attention", "ancestors", "one row first"
ONE_GRAPH, BFLOAT16 = "one graph", "bfloat16"


@dataclass(frozen=True)
class Model:
    """One network over one catalogue, on one device."""

    network: StreamRec
    runtime: EagerRuntime
    trie: Trie
    settings: SearchSettings

    @staticmethod
    def make(network: StreamRec, tokens: torch.Tensor, trie: Trie, settings: SearchSettings) -> Model:
        """Shape: tokens (I, M) int64 by catalogue row."""
        return Model(network, EagerRuntime(network, tokens, "bidirectional"), trie, settings)

    def to(self, device: torch.device) -> Model:
        network, tokens = copy.deepcopy(self.network).to(device), self.runtime.item_tokens.to(device)
        return Model.make(network, tokens, self.trie.to(device), self.settings)


@dataclass(frozen=True)
class Case:
    """One search from encoder states: hidden (B, S, D), mask (B, S) bool, both on the model's device."""

    hidden: torch.Tensor
    mask: torch.Tensor
    steps: int
    beams: int


Rung = Callable[[Case], Paths]


def rungs(model: Model, capture: Capture | None) -> dict[str, Rung]:
    """All rungs, the slowest first. capture: as in `GraphSearch`."""
    half = replace(model, runtime=Bfloat16Runtime(model.runtime))
    return {
        EXPANDED: lambda case: reordering(model, case, expanded=True),
        SHARED: lambda case: reordering(model, case, expanded=False),
        ANCESTORS: lambda case: all_rows(model, case),
        ONE_ROW: lambda case: one_row(model, case),
        ONE_GRAPH: one_graph(model, capture),
        BFLOAT16: one_graph(half, capture),
    }


def reordering(model: Model, case: Case, expanded: bool) -> Paths:
    """Every beam is a row with its own cache and, where `expanded`, its own cross-attention keys and values."""
    runtime, trie, t5, device = model.runtime, model.trie, model.network.t5, case.hidden.device
    batch, beams = len(case.hidden), case.beams
    cross = runtime.cross_keys_values(case.hidden, case.mask)
    if expanded:
        layers = [
            (keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0)) for keys, values in cross.layers
        ]
        cross = CrossKeysValues(layers, cross.bias.repeat_interleave(beams, 0))
    lo, hi = model.settings.reasoning_range
    first_row = beams * torch.arange(batch, device=device)[:, None]
    scores, node = first_row_scores(case), torch.zeros(batch, beams, dtype=torch.int64, device=device)
    x = runtime.embed(torch.full((batch * beams, 1), model.settings.start_tokens[case.steps], device=device))
    past: KeysValues | None = None
    hidden_sum = torch.zeros_like(x)
    for position in range(case.steps + trie.levels):
        bias = runtime.relative_bias[:, : position + 1].flip(1)[None, :, None]  # (1, H, 1, W)
        hidden, past = decode(t5, x, bias, cross, past)
        log_probs = t5.logits(hidden).log_softmax(-1)
        if position <= case.steps:
            hidden_sum = hidden_sum + hidden
            state = runtime.state(hidden_sum)
        if position < case.steps:
            x = runtime.step_input(log_probs[..., lo:hi].argmax(-1) + lo, state)
            continue
        level = position - case.steps
        step, child = trie.expand(log_probs.view(batch, beams, -1), node, level)
        candidates = (scores.unsqueeze(-1) + step).flatten(1)
        flat = stable_topk(candidates, child.flatten(1), beams)
        scores, parent = candidates.gather(1, flat), flat // child.shape[2]
        node = child.flatten(1).gather(1, flat).long()
        if level + 1 < trie.levels:
            row = (first_row + parent).flatten()
            past = [(keys.index_select(0, row), values.index_select(0, row)) for keys, values in past]
            x = runtime.embed(trie.token[node]).view(batch * beams, 1, -1)
    item = trie.item[node - trie.level_start[trie.levels]].long()
    return Paths(item.masked_fill(scores == NEG_INF, -1).unsqueeze(-1), scores)


def decode(
    t5: T5, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
) -> tuple[torch.Tensor, KeysValues]:
    """The decoder over R rows, each with its own past: x (R, 1, D), bias (1, H, 1, W), past (R, H, W - 1, d_kv).

    cross: of R rows, or of B requests, each shared by R / B rows.
    """
    blocks: Any = t5.decoder.block
    present: KeysValues = []
    for number, block in enumerate(blocks):
        self_attention, cross_attention, feed_forward = block.layer
        normed = self_attention.layer_norm(x)
        keys, values = self_attention.part.keys_values(normed)
        if past is not None:
            keys, values = torch.cat([past[number][0], keys], 2), torch.cat([past[number][1], values], 2)
        present.append((keys, values))
        x = x + self_attention.part(normed, keys, values, bias)
        queries = cross_attention.layer_norm(x).view(len(cross.bias), -1, x.shape[-1])
        x = x + cross_attention.part(queries, *cross.layers[number], cross.bias).view(x.shape)
        x = x + feed_forward.part(feed_forward.layer_norm(x))
    return t5.decoder.final_layer_norm(x), present


def all_rows(model: Model, case: Case) -> Paths:
    """Our search with one row per beam from the start token on; until the first item token all rows are equal."""
    runtime, device = model.runtime, case.hidden.device
    cross = runtime.cross_keys_values(case.hidden, case.mask)
    lo, hi = model.settings.reasoning_range
    shape = len(case.hidden), case.beams
    start = torch.full(shape, model.settings.start_tokens[case.steps], device=device)
    hidden, rows = decode_step(runtime, cross, None, runtime.embed(start))
    hidden_sum, states = hidden, [runtime.state(hidden)]
    tokens = torch.zeros(*shape, 0, dtype=torch.int64, device=device)
    log_probs = torch.zeros(*shape, 0, device=device)
    for _ in range(case.steps):
        log_prob, token = runtime.logits(hidden).log_softmax(-1)[..., lo:hi].max(-1)
        tokens = torch.cat([tokens, token.unsqueeze(-1) + lo], -1)
        log_probs = torch.cat([log_probs, log_prob.unsqueeze(-1)], -1)
        hidden, rows = decode_step(runtime, cross, rows, runtime.step_input(token + lo, states[-1]))
        hidden_sum = hidden_sum + hidden
        states.append(runtime.state(hidden_sum))
    first = token_log_probs(runtime, model.settings, hidden, model.settings.level_ranges[0])
    paths = ReasoningPaths(rows, first, first_row_scores(case), torch.stack(states, 2), tokens, log_probs)
    return as_paths(decode_items(runtime, model.trie, model.settings, cross, paths, case.beams, None, None))


def one_row(model: Model, case: Case) -> Paths:
    cross = model.runtime.cross_keys_values(case.hidden, case.mask)
    return as_paths(search(model.runtime, model.trie, model.settings, cross, steps=case.steps, beam_width=case.beams))


def one_graph(model: Model, capture: Capture | None) -> Rung:
    searches = GraphSearch(model.runtime, model.trie, model.settings, capture)

    def rung(case: Case) -> Paths:
        return as_paths(searches.search(case.hidden, case.mask, steps=case.steps, beam_width=case.beams, paths=1))

    return rung


class Bfloat16Runtime(EagerRuntime):
    """Weights and caches in bfloat16; the output layer and all sums of the search in float32. No dense score."""

    def __init__(self, full: EagerRuntime) -> None:
        super().__init__(copy.deepcopy(full.network).bfloat16(), full.item_tokens, full.attention)
        self.output = full.network.t5

    def cross_keys_values(
        self, hidden: torch.Tensor, mask: torch.Tensor, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        cross = super().cross_keys_values(hidden.bfloat16(), mask, buckets)
        return CrossKeysValues(cross.layers, cross.bias.bfloat16())

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        hidden, present = self.network.t5.decode(x, bias, cross, past)
        return hidden.float(), present

    def logits(self, hidden: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
        return self.output.logits(hidden, block)

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return super().step_input(token, state.bfloat16())

    def state(self, hidden_sum: torch.Tensor) -> torch.Tensor:
        return super().state(hidden_sum.bfloat16()).float()


def first_row_scores(case: Case) -> torch.Tensor:
    """Scores of K equal rows of which only the first counts. Shape: (B, K)."""
    scores = torch.full((len(case.hidden), case.beams), NEG_INF, device=case.hidden.device)
    scores[:, 0] = 0
    return scores


def as_paths(beams: Beams) -> Paths:
    """The items of an answer, by catalogue row."""
    return Paths(beams.items.unsqueeze(-1), beams.scores)


def run_again(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
    """Replaces a graph where there is no GPU: a replay computes everything again, into the captured beams."""
    beams = run()

    def replay() -> None:
        fresh = run()
        for field in fields(Beams):
            getattr(beams, field.name).copy_(getattr(fresh, field.name))

    return replay, beams
