"""Stage 2: supervised fine-tuning on reasoning made by iterative inference (see `training.stages.reasoning`).

    Y = [o_1 .. o_l ; target];   L = NLL(Y) + state loss at every step + quantization + preference     [paper: the four]

[open], and why: every step trains l = 0 and one l > 0 on one encoder pass (drawing l at random alone costs l = 0
10-15%); the labels are made with the current weights; the input is the model's own token, as it will be when serving.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from serving.network.model import StreamRec
from serving.network.t5 import CrossKeysValues
from training.config import SftConfig
from training.data.examples import Examples, Rows, batch_at
from training.stages.answers import rivals
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import (
    contrastive,
    distillation,
    full_softmax,
    nll,
    preference,
    quantization,
)
from training.stages.predictions import Predictions, predict_items, predict_reasoning
from training.stages.reasoning import (
    ReasoningTrace,
    greedy,
    reason,
    residual_label,
    teacher_force,
    teacher_force_directly,
)
from training.workspace import Workspace


class SftStep:
    """Computes the loss of a step. `reference`: what the preference loss compares with, the network as it was after
    `preference_after` steps, frozen; checkpoints contain it. Before that the loss does not count.
    """

    def __init__(self, work: Workspace, config: SftConfig) -> None:
        self.work, self.config = work, config
        self.rows: Rows = work.windows or work.examples
        self.reference: StreamRec | None = None
        if config.preference_weight:
            self.reference = copy.deepcopy(work.network).eval().requires_grad_(False)
        self.kept = self.reference

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config, network = self.work, self.config, self.work.network
        if self.reference is not None and step == config.preference_after > 0 == shard.part:
            self.reference.load_state_dict(network.state_dict())
        start_tokens = work.vocabulary.start_tokens
        examples = self.rows.examples(batch_at(self.rows, config.batch_size, work.config.seed + 1, step))
        shard = shard.of(len(examples))
        micro_batch = shard.micro_batch(np.arange(len(examples)))
        all_targets, local_index = work.send(examples.targets(micro_batch)), work.send(shard.local_index)
        target_item = all_targets[local_index]  # (b,)
        target = work.item_tokens[target_item].unsqueeze(1)  # (b, 1, M)
        index = shard.local(micro_batch)
        cross = work.encode_examples(examples, index)
        steps = work.draw_steps(shard.draws)
        vectors = network.item_vectors(work.item_tokens)
        total = torch.zeros(())
        terms: Terms = {}

        def add(name: str, weight: float, value: torch.Tensor) -> None:
            nonlocal total
            total = total + weight * value
            terms[name] = value.detach()

        hidden, direct_state = teacher_force_directly(network, cross, start_tokens[0], target)
        direct, states = predict_items(work, hidden), [direct_state]
        if config.plain_weight:
            add("nll_plain", config.plain_weight, nll(direct, target, config.label_smoothing))
        if steps:
            labeller = Labeller(work, config, vectors[target_item].detach(), shard)
            trace = reason(network, cross, start_tokens[steps], steps, labeller.choose)
            hidden, state = teacher_force(network, cross, trace, target)
            reasoned = predict_items(work, hidden)
            states += [*trace.states, state]
            if config.answer_weight:
                add("nll_answer", config.answer_weight, nll(reasoned, target, config.label_smoothing))
            if labeller.labels and config.reasoning_weight:
                labels = torch.stack(labeller.labels, 1).unsqueeze(1)  # (B, 1, l)
                add("nll_reasoning", config.reasoning_weight, nll(predict_reasoning(work, trace.hidden), labels))
            if labeller.residuals and config.quantization_weight:
                codes = [network.t5.shared(label) for label in labeller.labels]
                each = [quantization(r, c) for r, c in zip(labeller.residuals, codes, strict=True)]
                add("quantization", config.quantization_weight, torch.stack(each).mean())
            if config.distillation_weight:
                add("distillation", config.distillation_weight, distillation(direct, reasoned))
            if self.reference is not None and step >= config.preference_after:
                rival = work.item_tokens[rivals(work, cross, target_item)].unsqueeze(1)
                now = pair_log_probs(work, cross, trace, reasoned, target, rival)
                before = self.reference_log_probs(examples, index, trace, target, rival)
                add("preference", config.preference_weight, preference(*now, *before, config.preference_beta))
        if config.state_weight:
            each = [self.state_loss(s[:, 0], vectors, all_targets, local_index) for s in states]
            add("state", config.state_weight, torch.stack(each).mean())
        return shard.mean(total, terms)

    def state_loss(
        self, state: torch.Tensor, vectors: torch.Tensor, all_targets: torch.Tensor, local_index: torch.Tensor
    ) -> torch.Tensor:
        """all_targets: (B,) target items of the micro-batch's rows; the states are of those at `local_index` (b,)."""
        if self.config.state_loss == "contrastive":
            temperature = self.config.contrastive_temperature
            return contrastive(state, vectors[all_targets], all_targets, local_index, temperature)
        return full_softmax(state, vectors, all_targets[local_index])

    @torch.no_grad()
    def reference_log_probs(
        self, examples: Examples, index: np.ndarray, trace: ReasoningTrace, target: torch.Tensor, rival: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`pair_log_probs` under the frozen reference, on the same reasoning tokens. Shapes: (B,) both."""
        assert self.reference is not None
        work = self.work.with_network(self.reference)
        cross = work.encode_examples(examples, index)
        start_token, steps = work.vocabulary.start_tokens[trace.steps], trace.steps
        replay = reason(self.reference, cross, start_token, steps, lambda i, *_: trace.tokens[i - 1])
        hidden, _ = teacher_force(self.reference, cross, replay, target)
        return pair_log_probs(work, cross, replay, predict_items(work, hidden), target, rival)


def pair_log_probs(
    work: Workspace,
    cross: CrossKeysValues,
    trace: ReasoningTrace,
    reasoned: Predictions,
    target: torch.Tensor,
    rival: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P([o; target] | x) and log P(rival | x), without reasoning. Shapes: tokens (B, 1, M) both -> (B,) both.

    reasoned: of the item's tokens after `trace`. A fed-back state alone has no tokens o.
    """
    winner = reasoned.of(target).sum((1, 2))
    if work.network.step_form != "state":
        winner = winner + predict_reasoning(work, trace.hidden).of(torch.stack(trace.tokens, -1)).sum((1, 2))
    hidden, _ = teacher_force_directly(work.network, cross, work.vocabulary.start_tokens[0], rival)
    return winner, predict_items(work, hidden).of(rival).sum((1, 2))


class Labeller:
    """Chooses the reasoning tokens while the decoder reasons, and keeps labels and residuals for the losses.

    target: t, the target's representation, (B, D), no gradient [open: the sum of its token embeddings and its free
    vector]. A fed-back state alone needs no labels.
    """

    def __init__(
        self, work: Workspace, config: SftConfig, target: torch.Tensor, shard: BatchShard = WHOLE_BATCH
    ) -> None:
        self.work, self.config, self.target, self.shard = work, config, target, shard
        self.labels: list[torch.Tensor] = []
        self.residuals: list[torch.Tensor] = []

    def choose(self, step: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        lo, hi = self.work.vocabulary.reasoning_range
        network = self.work.network
        own = greedy(network, (lo, hi))(step, hidden, state)
        if network.step_form == "state":
            return own
        if self.config.labels == "residual":
            balanced = self.config.balanced
            label, residual = residual_label(network, self.target, state[:, 0], (lo, hi), balanced, self.shard)
            self.residuals.append(residual)
        elif self.config.labels == "random":  # control: as many latent tokens that mean nothing
            label = self.work.send((lo + self.shard.rand(len(own)) * (hi - lo)).long())
        else:  # control: a "pause", the same token every time, learnt so that the search writes it too
            label = torch.full((len(own),), lo, device=own.device)
        self.labels.append(label)
        given = self.config.inputs == "label" or self.config.labels == "pause"
        return label.unsqueeze(1) if given else own
