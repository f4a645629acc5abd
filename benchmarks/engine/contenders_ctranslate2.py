"""The contender of `peers.py` that uses CTranslate2."""

from __future__ import annotations

import tempfile
from typing import Any

import ctranslate2
import torch
from ctranslate2.converters.transformers import T5Loader

from benchmarks.engine.answers import Paths
from benchmarks.engine.contenders import Case, Contender, Model
from serving.items.vocabulary import END, PAD


def translate(model: Model) -> Contender:
    """CTranslate2 over every token of the vocabulary: it has no constraint, so its answers are not items.

    A reference for speed only. It cannot start from encoder states, so its time includes the encoder.
    """
    words = [f"t{token}" for token in range(model.vocabulary.size)]
    loader = T5Loader()
    spec = loader.get_model_spec(model.transformers)
    loader.set_vocabulary(spec, words)  # there is no tokenizer: every id is a word
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = words[PAD], words[END], words[PAD]
    spec.config.layer_norm_epsilon = model.network.t5.config.layer_norm_epsilon  # which the loader does not copy
    spec.config.decoder_start_token = None  # every request passes its own as the target's prefix
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
