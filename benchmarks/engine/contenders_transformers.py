"""The contenders of `peers.py` that use transformers' `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.engine.answers import Paths
from benchmarks.engine.contenders import Case, Contender, Model, Read, start_token
from serving.items.vocabulary import PAD


def generate_with_function(model: Model) -> Contender:
    """`generate` with `prefix_allowed_tokens_fn` over a dict of prefixes, as its documentation suggests.

    With reasoning, the beams run over reasoning tokens and item tokens alike.
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

        start = start_token(model, case)
        new = case.steps + model.vocabulary.tokens_per_item
        return _generate(model, case, start, new, prefix_allowed_tokens_fn=function)

    return Contender(answer, _read_sequences(opening=1))


class TrieMask(LogitsProcessor):
    """Masks whole batches at once: a prefix is one integer, its continuations a range of the sorted prefixes.

    opening: decoder tokens before the first generated one; steps: reasoning tokens generated before the item's tokens.
    """

    def __init__(self, model: Model, opening: int, steps: int) -> None:
        self.opening, self.steps = opening, steps
        self.lo, self.hi = model.vocabulary.reasoning_range
        self.base = model.vocabulary.size
        self.powers = self.base ** torch.arange(model.vocabulary.tokens_per_item - 1, -1, -1)
        keys = (model.item_tokens * self.powers).sum(1).sort().values
        self.prefixes = [(keys // power).unique() for power in self.powers]  # of 1, 2, ... M tokens
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
        key = (path * self.powers[len(self.powers) - level :]).sum(1, keepdim=True) * self.base
        prefixes = self.prefixes[level]
        first, end = torch.searchsorted(prefixes, torch.cat([key, key + self.base], 1)).unbind(1)
        child = first[:, None] + torch.arange(self.widest[level])
        token = prefixes[child.clamp(max=len(prefixes) - 1)] % self.base
        kept = scores.gather(1, token).masked_fill(child >= end[:, None], -torch.inf)
        # Padding repeats another node's token: the larger score wins, which is the permitted one where there is one.
        return torch.full_like(scores, -torch.inf).scatter_reduce_(1, token, kept, "amax")


def generate_with_mask(model: Model) -> Contender:
    """`generate` with the constraint as tensor operations, the fastest that a LogitsProcessor can be."""
    masks: dict[int, TrieMask] = {}

    def answer(case: Case) -> Any:
        mask = masks.setdefault(case.steps, TrieMask(model, opening=1, steps=case.steps))
        new = case.steps + model.vocabulary.tokens_per_item
        return _generate(model, case, start_token(model, case), new, logits_processor=LogitsProcessorList([mask]))

    return Contender(answer, _read_sequences(opening=1))


def generate_greedy_reasoning(model: Model) -> Contender:
    """Two calls, both masked by tensor operations: greedy reasoning tokens, then a beam over items.

    Our search with one reasoning path is defined so, and must give the same answers.
    """
    reasoning_masks: dict[int, TrieMask] = {}
    item_masks: dict[int, TrieMask] = {}

    def answer(case: Case) -> Any:
        reason = reasoning_masks.setdefault(case.steps, TrieMask(model, opening=1, steps=case.steps))
        decode = item_masks.setdefault(case.steps, TrieMask(model, opening=1 + case.steps, steps=0))
        greedy = Case(case.steps, 1, case.tokens, case.hidden)
        start = start_token(model, case)
        if case.steps:
            start = _generate(
                model, greedy, start, case.steps, logits_processor=LogitsProcessorList([reason])
            ).sequences
        new = model.vocabulary.tokens_per_item
        return _generate(model, case, start, new, logits_processor=LogitsProcessorList([decode]))

    def read(output: Any, case: Case) -> Paths:
        return _read_sequences(opening=1 + case.steps)(output, case)

    return Contender(answer, read)


def _generate(model: Model, case: Case, start: torch.Tensor, new_tokens: int, **constraint: Any) -> Any:
    return model.transformers.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=case.hidden),  # a new one: generate expands it in place
        attention_mask=torch.ones_like(case.tokens),
        decoder_input_ids=start,
        decoder_start_token_id=model.vocabulary.start_tokens[case.steps],  # else generate prepends its own
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
