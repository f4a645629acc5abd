"""The slow reference against transformers' own beam search, which knows nothing of this project."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from serving.bundle import Bundle
from serving.items.histories import history_tokens
from serving.reference import Reference
from tests.answers import assert_same_answer
from tests.builders import tiny_model

HISTORY = (3, 1, 4, 1, 5)


def generate(bundle: Bundle, prefix: list[int], beam_width: int) -> list[tuple[int, float]]:
    """Items and scores by `generate` with `prefix_allowed_tokens_fn`, after a given decoder prefix."""
    model = T5ForConditionalGeneration(T5Config(**bundle.network.t5.config.to_transformers()))
    model.load_state_dict(bundle.network.t5.state_dict(), strict=False)
    model = model.double().eval()
    items = {tuple(row): i for i, row in enumerate(bundle.catalogue.tokens.tolist())}
    tokens, mask = history_tokens([HISTORY], bundle.catalogue.tokens, bundle.settings.max_items, ())

    def allowed(_: int, written: torch.Tensor) -> list[int]:
        so_far = tuple(written.tolist()[len(prefix) :])
        return sorted({item[len(so_far)] for item in items if item[: len(so_far)] == so_far})

    found = model.generate(
        input_ids=tokens,
        attention_mask=mask.long(),
        decoder_start_token_id=prefix[0],
        decoder_input_ids=torch.tensor([prefix]),
        num_beams=beam_width,
        num_return_sequences=beam_width,
        max_new_tokens=len(next(iter(items))),
        prefix_allowed_tokens_fn=allowed,
        length_penalty=0.0,
        eos_token_id=10**6,  # never generated: an item ends with its last token
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    written = [tuple(sequence[len(prefix) :]) for sequence in found.sequences.tolist()]
    return list(zip([items[item] for item in written], found.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("beam_width", [2, 5, 20])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_reference_agrees_with_generate(steps, beam_width):
    bundle = tiny_model(40, seed=steps, step_form="token")
    reference = Reference(bundle, HISTORY, steps)
    (path,) = reference.paths()
    prefix = [bundle.vocabulary.start_tokens[steps], *path.tokens]
    expected = generate(bundle, prefix, beam_width)
    found = reference.search(beam_width, range(40))
    assert_same_answer(found, expected, tolerance=2e-5)  # generate adds up its scores in float32
