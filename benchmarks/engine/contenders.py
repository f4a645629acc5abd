"""The contenders of `peers.py`: one model over one catalogue, searched by what people use today and by ours.

All read the same weights and answer the same question: the best K items for a history, as token paths with the sum of
their log-probabilities. Every one but CTranslate2 starts from encoder states that are there already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import T5Loader
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.engine.answers import Paths
from benchmarks.engine.sizes import HISTORY_ITEMS, random_network
from serving.items.trie import Trie, build_trie
from serving.items.vocabulary import END, PAD, Vocabulary
from serving.network.model import StreamRec
from serving.network.runtime import Runtime
from serving.network.t5 import ModelConfig
from serving.search.beam import search
from serving.types import SearchSettings


@dataclass(frozen=True)
class Model:
    """Random weights, in our network and in transformers', and the catalogue they are to name items of.

    item_tokens: (I, M) int64, vocabulary ids.
    """

    vocabulary: Vocabulary
    network: StreamRec
    transformers: T5ForConditionalGeneration
    item_tokens: torch.Tensor
    trie: Trie


@dataclass(frozen=True)
class Case:
    """One search: B histories, tokens (B, S) int64 and what the encoder made of them, hidden (B, S, D)."""

    steps: int
    beams: int
    tokens: torch.Tensor
    hidden: torch.Tensor

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]


Answer = Callable[[Case], Any]  # what is timed
Read = Callable[[Any, Case], Paths]  # the answer in common terms, not timed


@dataclass(frozen=True)
class Contender:
    answer: Answer
    read: Read


# The model and its catalogue


def make_model(config: ModelConfig, vocabulary: Vocabulary, codes: np.ndarray, seed: int) -> Model:
    """Shape: codes (I, M), distinct."""
    network = random_network(config, len(codes), seed)
    theirs = T5ForConditionalGeneration(T5Config(**config.to_transformers())).eval()
    missing, unexpected = theirs.load_state_dict(network.t5.state_dict(), strict=False)
    if unexpected or any(not name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in missing):
        raise RuntimeError(f"transformers' T5 names its weights otherwise: {missing} {unexpected}; adapt benchmarks.")
    tokens = vocabulary.tokens_of(codes)
    return Model(vocabulary, network, theirs, torch.from_numpy(tokens.astype(np.int64)), build_trie(tokens))


@torch.inference_mode()
def make_case(model: Model, steps: int, batch: int, beams: int, seed: int) -> Case:
    """Random histories of 20 items; the encoder has read them already."""
    rows = np.random.default_rng(seed).integers(0, len(model.item_tokens), (batch, HISTORY_ITEMS))
    tokens = model.item_tokens[torch.from_numpy(rows)].flatten(1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    hidden = model.network.t5.encode(tokens, mask, "bidirectional", model.vocabulary.tokens_per_item)
    return Case(steps, beams, tokens, hidden)


# Ours


def ours(model: Model, runtime: Runtime, paths: int = 1) -> Contender:
    """The search over one runtime, from encoder states: cross-attention keys and values are made anew each time."""
    settings = SearchSettings(tuple(model.vocabulary.start_tokens), model.vocabulary.reasoning_range, paths=paths)

    def answer(case: Case) -> Any:
        memory = runtime.cross_keys_values(case.hidden, torch.ones(case.tokens.shape, dtype=torch.bool))
        return search(runtime, model.trie, settings, memory, steps=case.steps, beam_width=case.beams)

    def read(beams: Any, case: Case) -> Paths:
        return Paths(model.item_tokens[beams.items], beams.scores)

    return Contender(answer, read)


# transformers


def generate_with_function(model: Model) -> Contender:
    """`generate` with `prefix_allowed_tokens_fn` over a dict of prefixes: what its documentation suggests.

    With reasoning, the beams run over the reasoning tokens and the item's tokens alike.
    """
    followers: dict[tuple[int, ...], set[int]] = {}
    for item in model.item_tokens.tolist():
        for level, token in enumerate(item):
            followers.setdefault(tuple(item[:level]), set()).add(token)
    allowed = {prefix: sorted(tokens) for prefix, tokens in followers.items()}
    reasoning = list(range(*model.vocabulary.reasoning_range))

    def answer(case: Case) -> Any:
        def function(_: int, tokens: torch.Tensor) -> list[int]:
            path = tokens.tolist()[1:]
            return reasoning if len(path) < case.steps else allowed[tuple(path[case.steps :])]

        start = _start(model, case)
        new = case.steps + model.vocabulary.tokens_per_item
        return _generate(model, case, start, new, prefix_allowed_tokens_fn=function)

    return Contender(answer, _read_sequences(opening=1))


class TrieMask(LogitsProcessor):
    """Masks whole batches at once: a prefix is one integer, its continuations a range of the sorted prefixes.

    opening: decoder tokens before the first that may be chosen; steps: reasoning tokens that are to be chosen first.
    """

    def __init__(self, model: Model, opening: int, steps: int) -> None:
        self.opening, self.steps = opening, steps
        self.lo, self.hi = model.vocabulary.reasoning_range
        self.base = model.vocabulary.size
        self.place = self.base ** torch.arange(model.vocabulary.tokens_per_item - 1, -1, -1)
        keys = (model.item_tokens * self.place).sum(1).sort().values
        self.prefixes = [(keys // place).unique() for place in self.place]  # of 1, 2, ... M tokens
        self.widest = [
            int(torch.unique(p // self.base, return_counts=True)[1].max()) if len(p) else 0 for p in self.prefixes
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        path = input_ids[:, self.opening :]
        if path.shape[1] < self.steps:
            return torch.full_like(scores, -torch.inf).index_copy_(
                1, torch.arange(self.lo, self.hi), scores[:, self.lo : self.hi]
            )
        path = path[:, self.steps :]
        level = path.shape[1]
        key = (path * self.place[len(self.place) - level :]).sum(1, keepdim=True) * self.base
        prefixes = self.prefixes[level]
        first, end = torch.searchsorted(prefixes, torch.cat([key, key + self.base], 1)).unbind(1)
        child = first[:, None] + torch.arange(self.widest[level])
        token = prefixes[child.clamp(max=len(prefixes) - 1)] % self.base
        kept = scores.gather(1, token).masked_fill(child >= end[:, None], -torch.inf)
        # A padded place repeats another node's token: the largest wins, which is the real one where there is one.
        return torch.full_like(scores, -torch.inf).scatter_reduce_(1, token, kept, "amax")


def generate_with_mask(model: Model) -> Contender:
    """`generate` with the constraint as tensor operations, the best that a LogitsProcessor can do."""
    masks: dict[int, TrieMask] = {}

    def answer(case: Case) -> Any:
        mask = masks.setdefault(case.steps, TrieMask(model, opening=1, steps=case.steps))
        new = case.steps + model.vocabulary.tokens_per_item
        return _generate(model, case, _start(model, case), new, logits_processor=LogitsProcessorList([mask]))

    return Contender(answer, _read_sequences(opening=1))


def generate_greedy_thought(model: Model) -> Contender:
    """Two calls, both masked by tensor operations: the greedy reasoning tokens, then a beam over items after them.

    This is what our search with one reasoning path means, so the answers are the same.
    """
    thought: dict[int, TrieMask] = {}
    after: dict[int, TrieMask] = {}

    def answer(case: Case) -> Any:
        think = thought.setdefault(case.steps, TrieMask(model, opening=1, steps=case.steps))
        find = after.setdefault(case.steps, TrieMask(model, opening=1 + case.steps, steps=0))
        alone = Case(case.steps, 1, case.tokens, case.hidden)
        start = _start(model, case)
        if case.steps:
            start = _generate(model, alone, start, case.steps, logits_processor=LogitsProcessorList([think])).sequences
        new = model.vocabulary.tokens_per_item
        return _generate(model, case, start, new, logits_processor=LogitsProcessorList([find]))

    def read(output: Any, case: Case) -> Paths:
        return _read_sequences(opening=1 + case.steps)(output, case)

    return Contender(answer, read)


def _start(model: Model, case: Case) -> torch.Tensor:
    return torch.full((case.batch, 1), model.vocabulary.start_tokens[case.steps])


def _generate(model: Model, case: Case, start: torch.Tensor, new_tokens: int, **constraint: Any) -> Any:
    return model.transformers.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=case.hidden),  # a fresh one: generate expands it in place
        attention_mask=torch.ones_like(case.tokens),
        decoder_input_ids=start,
        decoder_start_token_id=model.vocabulary.start_tokens[case.steps],  # else generate puts its own before ours
        max_new_tokens=new_tokens,
        num_beams=case.beams,
        num_return_sequences=case.beams,
        do_sample=False,
        length_penalty=0.0 if case.beams > 1 else None,  # the score is the sum of log-probabilities
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=case.beams > 1,
        **constraint,
    )


def _read_sequences(opening: int) -> Read:
    def read(output: Any, case: Case) -> Paths:
        tokens = output.sequences.unflatten(0, (case.batch, case.beams))[:, :, opening:]
        return Paths(tokens, output.sequences_scores.unflatten(0, (case.batch, case.beams)))

    return read


# CTranslate2


def translate(model: Model) -> Contender:
    """CTranslate2 over every token of the vocabulary: it has no constraint, so its answers are no items.

    A bound on speed and no peer in what it does. It cannot start from encoder states: its time includes the encoder.
    """
    words = [f"t{token}" for token in range(model.vocabulary.size)]
    loader = T5Loader()
    spec = loader.get_model_spec(model.transformers)
    loader.set_vocabulary(spec, words)  # ours is no language: a word per id takes the place of a tokenizer
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = words[PAD], words[END], words[PAD]
    spec.config.layer_norm_epsilon = model.network.t5.config.layer_norm_epsilon  # the loader leaves out T5's
    spec.config.decoder_start_token = None  # every request brings its own, as the target's prefix
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        translator = ctranslate2.Translator(folder, compute_type="float32", inter_threads=1, intra_threads=1)

    def answer(case: Case) -> Any:
        length = case.steps + model.vocabulary.tokens_per_item
        return translator.translate_batch(
            [[words[token] for token in history] for history in case.tokens.tolist()],
            target_prefix=[[words[model.vocabulary.start_tokens[case.steps]]]] * case.batch,
            beam_size=case.beams,
            num_hypotheses=case.beams,
            length_penalty=0,
            max_decoding_length=length,
            min_decoding_length=length,
            max_input_length=0,
            return_scores=True,
        )

    def read(results: Any, case: Case) -> Paths:
        tokens = [[[int(word[1:]) for word in path] for path in result.hypotheses] for result in results]
        return Paths(torch.tensor(tokens), torch.tensor([result.scores for result in results]))

    return Contender(answer, read)


# What is compared


@torch.inference_mode()
def rescore(model: Model, case: Case, tokens: torch.Tensor, without: int | None = None) -> torch.Tensor:
    """The sum of log-probabilities of given paths by our network, all positions at once. (B, K, T) -> (B, K).

    without: a token that is no part of the normalisation, as the end token before the least length in CTranslate2.
    """
    t5 = model.network.t5
    batch, count, length = tokens.shape
    memory = t5.cross_keys_values(
        case.hidden.repeat_interleave(count, 0), torch.ones(batch * count, case.tokens.shape[1]).bool()
    )
    start = _start(model, case).repeat_interleave(count, 0)
    inputs = torch.cat([start, tokens.flatten(0, 1)[:, :-1]], 1)
    at = torch.arange(length)
    bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], -torch.inf)
    hidden, _ = t5.decode(t5.shared(inputs), bias.unsqueeze(0), memory, None)
    logits = t5.logits(hidden)
    if without is not None:
        logits[..., without] = -torch.inf
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, tokens.flatten(0, 1).unsqueeze(-1)).sum((1, 2)).unflatten(0, (batch, count))
