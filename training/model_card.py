"""The model card of a bundle, its README.md: data, method, metrics, limits, licence."""

from __future__ import annotations

from typing import Any

from serving.items.neighbours import Neighbours
from serving.steps import worthwhile_steps
from serving.types import BundleSettings, Gate
from training.data.read import Dataset
from training.workspace import Workspace


def model_card(
    work: Workspace,
    data: Dataset,
    accuracy: list[dict[str, Any]],
    stages: dict[str, Any],
    int8: dict[str, Any],
    compared: list[dict[str, Any]],
    refitted: dict[str, Any] | None,
) -> str:
    """README.md of the bundle: data, method, metrics, limits, licence. compared: as by `compare`; []: no update.
    refitted: as by `refit`; None: not asked for."""
    config, model = work.config, work.config.model
    rows = "\n".join(
        f"| {row['steps']} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} | {_gain(row)} | "
        + (f"{row['detectable']:.4f}" if "detectable" in row else "")
        + f" | {1000 * row['seconds'] / row['users']:.2f} |"
        for row in accuracy
    )
    worthwhile = ", ".join(map(str, worthwhile_steps(accuracy, model.max_steps)))
    rounded = "\n".join(
        f"| {row['steps']} | {row['overlap@10']:.4f} | {row['ndcg@10']['fp32']:.4f} | {row['ndcg@10']['int8']:.4f} |"
        for row in int8["measured"]
    )
    least, may = int8["least"], "may" if int8["passed"] else "may not"
    trained = "\n".join(
        f"- {name}: {work.stage_config(name).steps} steps, best at {stage['best_step']}, "
        f"{stage['seconds'] / 60:.1f} minutes"
        for name, stage in stages.items()
    )
    codes = model.reasoning_codes or "no, shared with the items"
    softmax = "A token's probability is normalised over the whole vocabulary."
    if model.normalise == "block":
        softmax = (
            "A token's probability is normalised over the tokens that may stand at its position: the codes of the "
            "item's level\n(`vocabulary.level_offsets` and `codebook_sizes` in bundle.json), or the reasoning codes "
            "(`vocabulary.reasoning_range`)."
        )
    causal = ""
    if model.attention == "causal-by-item":
        causal = (
            "\nThe encoder is causal by item: position p (0-based) belongs to item p // tokens_per_item, and a token "
            "sees only positions whose item number is not larger than its own. Add minus infinity to the other "
            "attention scores.\n"
        )
    if model.age_bias:
        causal += (
            "\nThe decoder's cross-attention has a bias by an item's age, in every layer: with n items in the "
            "encoder's input, add row max(0, n - 1 - p // tokens_per_item), column h of `age_bias.weight` "
            "(heads.safetensors) to the attention scores of head h at position p.\n"
        )
    if model.time_bias:
        causal += (
            "\nThe decoder's cross-attention has another bias, in every layer, by how many seconds t before the newest "
            "event whose time is known an item's was: row min(31, 1 + floor(log2(1 + t))), column h of "
            "`time_bias.weight` (heads.safetensors); row 0 where the time is unknown, and for what follows the items.\n"
        )
    if model.item_input:
        causal += (
            "\nThe encoder's input of each of an item's tokens is the token's embedding plus the item's row of "
            "`item_input.weight` (heads.safetensors); nothing is added for items that came after training.\n"
        )
    near = judged = ""
    excluded = "excluded, as by default in a request" if config.evaluation.exclude_seen else "not excluded"
    if work.settings.neighbours_weight:
        judged = (
            " Each user was judged with a memory and a gate that other users chose;\n"
            "validation also kept the network's best weights."
        )
    if work.neighbours is not None and work.settings.gate is not None:
        near = memory_card(work.neighbours, work.settings, work.settings.gate)
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
{softmax}
With `step_form` state or both, the decoder's input at step i also gets `feedback.weight` times s_(i-1).
{causal}{near}
## Accuracy on validation
Full ranking for {accuracy[0]["users"]} of {accuracy[0]["of"]} users, beam {config.evaluation.beam}, seen items
{excluded}, dense weight {work.settings.dense_weight}, neighbours weight {work.settings.neighbours_weight}.{judged}

| steps | recall@10 | NDCG@10 | gain in NDCG@10, 95% interval | detectable | ms per user |
|---|---|---|---|---|---|
{rows}

The gain is over 0 steps, on the same users; `detectable` is the smallest true gain that so many of them show with 80%
power; the noise of training is in neither. The time is that of this ranking, in batches, on the machine that made the
bundle: a service measures its own (`GET /models`).

Default: {work.settings.default_steps} steps. `reasoning_steps=auto` chooses from: {worthwhile}. A number above 0 is
among them only where the lower end of its gain's interval is above what fewer steps gain.

{refit_card(refitted) if refitted else ""}{update_card(compared) if compared else ""}## 8-bit weights
The runtime `onnx-int8` {may} serve this bundle. It may if it keeps {least["overlap@10"]:.0%} of float32's top 10 and
{least["ndcg@10"]:.0%} of its NDCG@10 on {int8["users"]} validation users.

| steps | overlap@10 | ndcg@10 float32 | ndcg@10 int8 |
|---|---|---|---|
{rounded}

## Sample
sample.json holds the histories of a few validation users, without user ids, and the model's ten best items after 0 and
after {model.max_steps} reasoning steps. A service compares its own answers with them before it serves the bundle beside
another.

## Limits
The model knows only the items of its catalogue. It follows what people did in the training data, with whatever bias
that has, and was not evaluated on users who behave differently.
"""


def refit_card(refitted: dict[str, Any]) -> str:
    """The section of the model card on what was learnt from the events of validation."""
    trial = refitted["trial"]
    learnt = (
        "The bundle has learnt from the events of all users then, so its accuracy can only be measured on "
        "test data.\nThe table of 8-bit weights compares on users whose events it knows."
    )
    left = "So the bundle has learnt from none of them."
    return f"""## Learning from the newest events
All of the above was measured without the events that validation held out. To see what they teach, network and memory
learnt from those of {trial["learnt_from"]} users first, and {trial["users"]} of {trial["of"]} others judged: NDCG@10
{trial["ndcg@10_before"]:.4f} before and {trial["ndcg@10"]:.4f} after, {_gain(trial)}.
{learnt if refitted["kept"] else left}

"""


def update_card(compared: list[dict[str, Any]]) -> str:
    """The section of the model card that compares an update with the bundle it goes on from."""
    rows = "\n".join(
        f"| {row['model']} | {row['steps']} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} | {_gain(row)} |"
        for row in compared
    )
    return f"""## Update
This bundle goes on from {compared[0]["model"]}: items kept their tokens, and the weights were trained further with the
interactions above. Both rank the same items for {compared[0]["users"]} of {compared[0]["of"]} users, whose newest event
this update was not trained on. The gain in NDCG@10 has its 95% interval over users.

| model | steps | recall@10 | ndcg@10 | gain |
|---|---|---|---|---|
{rows}

"""


def _gain(row: dict[str, Any]) -> str:
    """A row's gain with its interval; empty where it is what others are compared with."""
    return f"{row['gain']:+.4f} ({row['gain_low']:+.4f} to {row['gain_high']:+.4f})" if "gain" in row else ""


def memory_card(neighbours: Neighbours, settings: BundleSettings, gate: Gate) -> str:
    """The section of the model card with all that an outsider needs to compute the joined score."""
    weights = ", ".join(f"{weight:g} for {kind}" for kind, weight in settings.type_weights) or "none here"
    weights += ", and 1 of all others"
    terms = "".join(f"\n    {value:+.6g} * {name}" for name, value in gate.coefficients.items())
    return f"""
## Item memory
neighbours.safetensors holds weights w(i, j) between items, counted in training sequences and texts, learnt by a
linear model of the next item, or both: the entries offsets[i] to offsets[i + 1] of `items` (catalogue rows) and of
`weights`, which may be negative. n(j) is the sum over the last {settings.max_items} items i_t of the history, t steps
back from the newest, of a_t * (t + 1) ** -{neighbours.recency} * w(i_t, j), or 0 where that is negative, and an item's
share is n(j) / sum of n over all items. a_t is the weight of the event's type, {weights}. Then

    score(j) = 1/alpha * log( g * exp(alpha * N(j)) + (1 - g) * share(j) ** beta )
    alpha = {gate.network_power:.6g}, beta = {gate.memory_power:.6g}
    log(g / (1 - g)) = {gate.intercept:.6g}{terms}
    - log(neighbours_weight)

N(j) is the network's score: its log-probabilities summed over the item's tokens, plus dense_weight times the dense
score. support = log of the sum of n; peak = the largest share; entropy = -sum of share * log(share); length = log of
the number of history items read; confidence = the largest log-probability of a first item token, after the likeliest
reasoning path. Where the sum of n is 0, g is 1. alpha, beta (`network_power`, `memory_power`) and the coefficients are
in `score.neighbours_gate` in bundle.json. The weight of this bundle is {settings.neighbours_weight}: 1 joins as fitted,
and with 0 the score is the network's alone. Ranked are the items that the beam finds and the
{settings.dense_candidates} permitted ones with the largest share above 0. `about.neighbours` in bundle.json holds
what validation chose, and what that was worth to users who did not choose it.
"""
