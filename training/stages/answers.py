"""Answers as they would be served, inside a training step: the serving search on the network as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from serving.network.eager import EagerRuntime
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.beam import decode_items, search, search_settings
from serving.search.decoder import ReasoningPaths, decode_step, token_log_probs
from serving.types import SearchSettings
from training.workspace import Workspace

BEAM = 10  # wide enough for the ten items that are judged


@torch.no_grad()
def rivals(work: Workspace, cross: CrossKeysValues, target: torch.Tensor) -> torch.Tensor:
    """What the direct path prefers instead: the best item of its answer that is not the target. Shape: (B,) -> (B,).

    A catalogue of one item has no rival; the target itself is returned.
    """
    with as_served(work) as runtime:
        settings = search_settings(work.vocabulary, work.settings)
        found = search(runtime, work.trie, settings, cross, steps=0, beam_width=BEAM).items
    first, second = found[:, 0], found[:, min(1, found.shape[1] - 1)]
    return torch.where(first == target, second, first)


@torch.no_grad()
def answers_after(work: Workspace, cross: CrossKeysValues, reasoning: torch.Tensor) -> torch.Tensor:
    """The best items after given reasoning tokens, each path on its own. Shape: (B, G, l) -> (B, G, K), -1 for none."""
    batch, group, _ = reasoning.shape
    layers = [tuple(part.repeat_interleave(group, 0) for part in layer) for layer in cross.layers]
    each = CrossKeysValues([(keys, values) for keys, values in layers], cross.bias.repeat_interleave(group, 0))
    with as_served(work) as runtime:
        settings = search_settings(work.vocabulary, work.settings)
        paths = replay_reasoning(runtime, settings, each, reasoning.flatten(0, 1))
        beams = decode_items(runtime, work.trie, settings, each, paths, BEAM, None, None)
    return beams.items.view(batch, group, -1)


def replay_reasoning(
    runtime: Runtime, settings: SearchSettings, cross: CrossKeysValues, tokens: torch.Tensor
) -> ReasoningPaths:
    """`serving.search.beam.reason` along given tokens, one path a row. Shape: (R, l)."""
    rows, steps = tokens.shape
    start = torch.full((rows, 1), settings.start_tokens[steps], dtype=torch.int64, device=tokens.device)
    hidden, cache = decode_step(runtime, cross, None, runtime.embed(start))
    hidden_sum, states = hidden, [runtime.state(hidden)]
    for step in range(steps):
        hidden, cache = decode_step(runtime, cross, cache, runtime.step_input(tokens[:, step, None], states[-1]))
        hidden_sum = hidden_sum + hidden
        states.append(runtime.state(hidden_sum))
    certain = hidden.new_zeros(rows, 1)  # the only path has share 1
    first = token_log_probs(runtime, settings, hidden, settings.level_ranges[0])
    return ReasoningPaths(
        cache, first, certain, torch.stack(states, 2), tokens.unsqueeze(1), certain.unsqueeze(-1).expand(-1, -1, steps)
    )


@contextmanager
def as_served(work: Workspace) -> Iterator[Runtime]:
    """A runtime around the network, without dropout; afterwards the network is in the mode it was in."""
    with mode(work.network, training=False):
        yield EagerRuntime(work.network, work.item_tokens, work.settings.attention)


@contextmanager
def mode(network: nn.Module, training: bool) -> Iterator[None]:
    """With dropout or without, and afterwards as it was."""
    before = network.training
    network.train(training)
    try:
        yield
    finally:
        network.train(before)
