"""From trained weights to a bundle: validation chooses the defaults, then everything is measured and written down."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from serving.bundle import Bundle, write_bundle
from serving.catalogue import Catalogue
from serving.errors import BundleError
from serving.histories import history_tokens
from training.data import Dataset
from training.evaluate import measure, sample_users
from training.metrics import ndcg_per_user, paired_bootstrap
from training.quantization import int8_gate
from training.workspace import Workspace


def export(work: Workspace, data: Dataset, tokenizer_folder: Path, bundle_folder: Path, stages: dict[str, Any]) -> str:
    """Writes the bundle and returns its version. Validation NDCG@10 chooses `default_steps` and `dense_weight`."""
    choice = choose(work)
    work.settings = replace(work.settings, default_steps=choice.steps, dense_weight=choice.dense_weight)
    accuracy = [row | {"split": "valid"} for row in choice.table if row["dense_weight"] == choice.dense_weight]
    bundle = Bundle(work.config.name, "", work.vocabulary, work.settings, work.network, catalogue(work, data), accuracy)
    bundle.int8 = int8_gate(work)
    bundle.about = {
        "seed": work.config.seed,
        "data": data.name,
        "stages": stages,
        "config": work.config.to_json(),
        "choices": choice.table,
    }

    def write_tokenizer(folder: Path) -> None:
        for file in tokenizer_folder.iterdir():
            shutil.copyfile(file, folder / file.name)

    card = model_card(work, data, accuracy, stages, bundle.int8)
    version = write_bundle(bundle_folder, bundle, model_card=card, write_tokenizer=write_tokenizer)
    verify(bundle_folder)
    return version


@torch.no_grad()
def verify(bundle_folder: Path) -> None:
    """Opens the bundle as a stranger would, with transformers, and compares: raises BundleError where logits differ."""
    from transformers import T5ForConditionalGeneration  # seconds to import, and only needed here

    bundle = Bundle.load(bundle_folder)
    if bundle.settings.attention != "bidirectional":
        return  # transformers has no such encoder; the model card says how to build the mask
    t5 = bundle.network.t5
    tokens, mask = history_tokens(
        [tuple(range(min(3, len(bundle.catalogue))))],
        bundle.catalogue.tokens,
        bundle.max_items,
        bundle.settings.suffix_tokens,
    )
    inputs = torch.tensor([[bundle.vocabulary.start_tokens[0], *bundle.catalogue.tokens[0, :-1].tolist()]])
    at = torch.arange(inputs.shape[1])
    bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], float("-inf"))
    memory = t5.memory(t5.encode(tokens, mask, "bidirectional", bundle.catalogue.tokens.shape[1]), mask)
    ours = t5.logits(t5.decode(t5.shared(inputs), bias.unsqueeze(0), memory, None)[0])
    theirs = T5ForConditionalGeneration.from_pretrained(bundle_folder / "model").eval()
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=inputs).logits
    if not torch.allclose(ours, expected, atol=1e-3, rtol=1e-3):
        raise BundleError("transformers reads other logits from the bundle than streamrec; report this as a bug.")


@dataclass(frozen=True, slots=True)
class Choice:
    """What validation prefers, and `table`: a row per number of steps and dense weight that was tried."""

    steps: int
    dense_weight: float
    table: list[dict[str, Any]]


def choose(work: Workspace) -> Choice:
    """Measures every number of steps with every weight of the dense score on validation, and chooses.

    Thinking costs time at every request, so it has to show a gain: steps above 0 are chosen only where their NDCG@10
    lies above that of 0 steps, each with its best weight, by more than chance (95% paired bootstrap over users).
    """
    evaluation = work.config.evaluation
    histories, target = sample_users(work.split.valid_history, work.split.valid_target, evaluation.choice_users)
    table: list[dict[str, Any]] = []
    gains: dict[int, np.ndarray] = {}
    best: dict[int, dict[str, Any]] = {}
    pairs = [(steps, weight) for steps in range(work.vocabulary.max_steps + 1) for weight in evaluation.dense_weights]
    for steps, weight in tqdm(pairs, desc="choose", unit="setting", mininterval=1.0):
        row, ranked = measure(
            work.network, work.item_tokens, work.vocabulary, work.settings, histories, target,
            steps=steps, beam=evaluation.beam, dense_weight=weight,
        )  # fmt: skip
        table.append(row)
        if steps not in best or row["ndcg@10"] > best[steps]["ndcg@10"]:
            best[steps], gains[steps] = row, ndcg_per_user(ranked, target)
    chosen = best[0]
    for steps in range(1, work.vocabulary.max_steps + 1):
        gain, low, high = paired_bootstrap(gains[steps], gains[0], seed=0)
        best[steps] |= {"gain": round(gain, 5), "gain_low": round(low, 5), "gain_high": round(high, 5)}
        if low > 0 and best[steps]["ndcg@10"] > chosen["ndcg@10"]:
            chosen = best[steps]
    return Choice(chosen["steps"], chosen["dense_weight"], table)


def catalogue(work: Workspace, data: Dataset) -> Catalogue:
    """The data's items with their tokens; popularity counts training events only."""
    seen = np.bincount(
        np.concatenate([*work.split.train, np.empty(0, np.int32)]).astype(np.int64), minlength=len(data.items)
    )
    return Catalogue(
        item_ids=data.items.item_ids,
        tokens=work.item_tokens_here.astype(np.int32),
        titles=data.items.titles,
        categories=data.items.categories,
        popularity=seen.astype(np.float64),
    )


def model_card(
    work: Workspace, data: Dataset, accuracy: list[dict[str, Any]], stages: dict[str, Any], int8: dict[str, Any]
) -> str:
    """README.md of the bundle: data, method, metrics, limits, licence."""
    config, model = work.config, work.config.model
    rows = "\n".join(f"| {row['steps']} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} |" for row in accuracy)
    rounded = "\n".join(
        f"| {row['steps']} | {row['overlap@10']:.4f} | {row['ndcg@10']['fp32']:.4f} | {row['ndcg@10']['int8']:.4f} |"
        for row in int8["measured"]
    )
    least = int8["least"]
    trained = "\n".join(
        f"- {name}: {getattr(config, name).steps} steps, best at {stage['best_step']}, "
        f"{stage['seconds'] / 60:.1f} minutes"
        for name, stage in stages.items()
    )
    codes = model.reasoning_codes or "no, shared with the items"
    causal = ""
    if model.attention == "causal-by-item":
        causal = (
            "\nThe encoder is causal by item: position p (0-based) belongs to item p // tokens_per_item, and a token "
            "sees only positions whose item number is not larger than its own. Add minus infinity to the other "
            "attention scores.\n"
        )
    return f"""# {config.name}

A generative recommender: a T5 encoder-decoder that reads a history of semantic IDs, writes 0 to {model.max_steps}
reasoning tokens and then an item's tokens. Made by streamrec after "Slow Thinking for Sequential Recommendation"
(arXiv 2504.09627).

## Data
{data.name}: {len(data.user_ids)} users, {len(data.items)} items, {len(data.sequence)} interactions, split
{config.split}.
Licence of the data: {config.licence}.

## Method
{trained}

From the paper: semantic IDs by RQ-VAE, the three stages, residual reasoning labels, the five rewards. Left open by the
paper and chosen here: a reasoning step takes `{model.step_form}`, reasoning codes of their own: {codes},
labels `{config.sft.labels}` fed as `{config.sft.inputs}`, state loss `{config.sft.state_loss}`. An item's dense score
is log_softmax over all items of (s_l . v) / sqrt(d_model), with v = the sum of the item's token embeddings + its row of
`item_free.weight`, s_l = `state` MLP of the sum of the decoder's outputs at positions 0..l (all in heads.safetensors).
With `step_form` state or both, the decoder's input at step i also gets `feedback.weight` times s_(i-1).
{causal}
## Accuracy on validation
Full ranking, beam {config.evaluation.beam}, seen items not excluded, dense weight {work.settings.dense_weight}.

| steps | recall@10 | ndcg@10 |
|---|---|---|
{rows}

Default: {work.settings.default_steps} steps. More than 0 are the default only where their gain on validation is more
than chance.

## Weights of 8 bits
The runtime `onnx-int8` is {"open" if int8["passed"] else "closed"} to this bundle. Asked of {int8["users"]} validation
users: {least["overlap@10"]:.0%} of float32's top 10, and {least["ndcg@10"]:.0%} of its NDCG@10.

| steps | overlap@10 | ndcg@10 float32 | ndcg@10 int8 |
|---|---|---|---|
{rounded}

## Limits
It knows only the items of its catalogue, follows what people did in the training data with whatever bias that has, and
says nothing about users whose behaviour is unlike theirs.
"""
