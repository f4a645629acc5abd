"""What the contenders of `peers.py` have in common: one model over one catalogue, one case, and our own search.

All use the same weights and answer the same question: the best K items for a history, as token paths with the sum of
their log-probabilities. All but CTranslate2 start from encoder states that were computed before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.engine.answers import Paths
from benchmarks.engine.sizes import HISTORY_ITEMS, random_network
from serving.items.trie import Trie, build_trie
from serving.items.vocabulary import Vocabulary
from serving.network.model import StreamRec
from serving.network.runtime import Runtime
from serving.network.t5 import ModelConfig, float_mask
from serving.search.beam import search, search_settings
from serving.types import BundleSettings, Normalise


@dataclass(frozen=True)
class Model:
    """The same random weights in our network and in transformers', over one catalogue.

    item_tokens: (I, M) int64, vocabulary ids.
    """

    vocabulary: Vocabulary
    network: StreamRec
    transformers: T5ForConditionalGeneration
    item_tokens: torch.Tensor
    trie: Trie


@dataclass(frozen=True)
class Case:
    """One search for B histories: tokens (B, S) int64 and the encoder's output for them, hidden (B, S, D)."""

    steps: int
    beams: int
    tokens: torch.Tensor
    hidden: torch.Tensor

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]


Answer = Callable[[Case], Any]  # timed
Read = Callable[[Any, Case], Paths]  # converts an answer to the common form; not timed


@dataclass(frozen=True)
class Contender:
    answer: Answer
    read: Read


# The model and its catalogue


def make_model(config: ModelConfig, vocabulary: Vocabulary, codes: np.ndarray, seed: int) -> Model:
    """Shape: codes (I, M), distinct."""
    network = random_network(config, len(codes), seed)
    theirs = T5ForConditionalGeneration(T5Config(**config.to_transformers()))
    theirs.train(False)
    missing, unexpected = theirs.load_state_dict(network.t5.state_dict(), strict=False)
    if unexpected or any(not name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in missing):
        raise RuntimeError(f"transformers' T5 has other weight names: {missing} {unexpected}; adapt this benchmark.")
    tokens = vocabulary.tokens_of(codes)
    return Model(vocabulary, network, theirs, torch.from_numpy(tokens.astype(np.int64)), build_trie(tokens))


@torch.inference_mode()
def make_case(model: Model, steps: int, batch: int, beams: int, seed: int) -> Case:
    """Random histories of 20 items, already encoded."""
    rows = np.random.default_rng(seed).integers(0, len(model.item_tokens), (batch, HISTORY_ITEMS))
    tokens = model.item_tokens[torch.from_numpy(rows)].flatten(1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    hidden = model.network.encode(tokens, mask, "bidirectional", model.vocabulary.tokens_per_item)
    return Case(steps, beams, tokens, hidden)


# Ours


def ours(model: Model, runtime: Runtime, paths: int = 1, normalise: Normalise = "vocabulary") -> Contender:
    """Our search over one runtime, from encoder states: every search computes its cross-attention keys and values.

    normalise: `generate` does over the whole vocabulary, bundles over a block.
    """
    settings = search_settings(model.vocabulary, BundleSettings(paths=paths, normalise=normalise))

    def answer(case: Case) -> Any:
        cross = runtime.cross_keys_values(case.hidden, torch.ones(case.tokens.shape, dtype=torch.bool))
        return search(runtime, model.trie, settings, cross, steps=case.steps, beam_width=case.beams)

    def read(beams: Any, case: Case) -> Paths:
        return Paths(model.item_tokens[beams.items], beams.scores)

    return Contender(answer, read)


def start_token(model: Model, case: Case) -> torch.Tensor:
    return torch.full((case.batch, 1), model.vocabulary.start_tokens[case.steps])


@torch.inference_mode()
def rescore(model: Model, case: Case, tokens: torch.Tensor, without: int | None = None) -> torch.Tensor:
    """Our network's scores of given paths, sums of log-probabilities, all positions at once. (B, K, T) -> (B, K).

    without: a token left out of the normalisation, as CTranslate2 leaves out the end token before the minimum length.
    """
    t5 = model.network.t5
    batch, count, length = tokens.shape
    everything = torch.ones(batch * count, case.tokens.shape[1]).bool()
    cross = t5.cross_keys_values(case.hidden.repeat_interleave(count, 0), float_mask(everything))
    start = start_token(model, case).repeat_interleave(count, 0)
    inputs = torch.cat([start, tokens.flatten(0, 1)[:, :-1]], 1)
    at = torch.arange(length)
    bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], -torch.inf)
    hidden, _ = t5.decode(t5.shared(inputs), bias.unsqueeze(0), cross, None)
    logits = t5.logits(hidden)
    if without is not None:
        logits[..., without] = -torch.inf
    log_probs = logits.log_softmax(-1).gather(-1, tokens.flatten(0, 1).unsqueeze(-1))
    return log_probs.sum((1, 2)).view(batch, count)
