"""Rollouts of stage 3: groups of reasoning and items for the same histories, with the rewards they earn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.network.model import StreamRec, dense_logits
from serving.network.t5 import CrossKeysValues
from training.config import RlConfig
from training.stages import rewards
from training.stages.diagnostics import are_items
from training.stages.distributed import WHOLE_BATCH, BatchShard
from training.stages.predictions import predict_items, predict_reasoning
from training.stages.reasoning import ReasoningTrace, decode_directly, decode_items, reason
from training.workspace import Workspace, send


@dataclass(frozen=True, slots=True)
class Rollout:
    """G outputs for each of B histories.

    reasoning (B, G, l) and item (B, G, M): the tokens. log_probs (B, G, l + M): of each under the policy that wrote it.
    rewards: per name (B, G).
    """

    reasoning: torch.Tensor
    item: torch.Tensor
    log_probs: torch.Tensor
    rewards: dict[str, torch.Tensor]

    @property
    def steps(self) -> int:
        return self.reasoning.shape[-1]


@torch.no_grad()
def sample(
    work: Workspace,
    cross: CrossKeysValues,
    all_targets: torch.Tensor,
    steps: int,
    config: RlConfig,
    shard: BatchShard = WHOLE_BATCH,
) -> Rollout:
    """Samples `config.group` outputs per history, without the trie, and rewards them.

    all_targets: (B,) int64, target items of the micro-batch on all processes; `cross` is of the local histories.
    """
    shard = shard if shard.batch else shard.of(len(all_targets))
    network = work.network
    lo, hi = work.vocabulary.reasoning_range

    def choose(step: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return draw(network.t5.logits(hidden, (lo, hi)) / work.settings.temperature, shard) + lo

    trace = reason(network, cross, work.vocabulary.start_tokens[steps], steps, choose, paths=config.group)
    batch, levels = len(cross.bias), work.item_tokens.shape[1]
    item = torch.zeros(batch, config.group, levels, dtype=torch.int64, device=work.device)
    for level in range(levels):
        hidden, state = decode_items(network, cross, trace, item)
        predictions = predict_items(work, hidden)
        item[..., level] = draw(predictions.log_probs[level], shard) + predictions.first[level]
    reasoning = torch.stack(trace.tokens, -1) if steps else item[..., :0]
    log_probs = _log_probs(work, trace, hidden, reasoning, item)
    return Rollout(reasoning, item, log_probs, _rewards(work, cross, trace, item, state, all_targets, shard))


def policy_log_probs(work: Workspace, network: StreamRec, cross: CrossKeysValues, rollout: Rollout) -> torch.Tensor:
    """log P of a rollout's tokens under `network`, with gradient where it has any. Shape: (B, G, l + M)."""
    trace = _replay(work, network, cross, rollout.reasoning)
    hidden, _ = decode_items(network, cross, trace, rollout.item)
    return _log_probs(work.with_network(network), trace, hidden, rollout.reasoning, rollout.item)


def _replay(work: Workspace, network: StreamRec, cross: CrossKeysValues, tokens: torch.Tensor) -> ReasoningTrace:
    """Reasons with given tokens (B, G, l)."""
    _, group, steps = tokens.shape
    start_token = work.vocabulary.start_tokens[steps]
    return reason(network, cross, start_token, steps, lambda i, *_: tokens[..., i - 1], paths=group)


def _log_probs(
    work: Workspace, trace: ReasoningTrace, item_hidden: torch.Tensor, reasoning: torch.Tensor, item: torch.Tensor
) -> torch.Tensor:
    """Reasoning tokens are drawn among the reasoning codes, so that is what their probabilities are normalised over."""
    of_item = predict_items(work, item_hidden).of(item)
    if work.network.step_form == "state" or not trace.steps:  # no token was acted on
        return of_item
    return torch.cat([predict_reasoning(work, trace.hidden).of(reasoning), of_item], -1)


def _rewards(
    work: Workspace,
    cross: CrossKeysValues,
    trace: ReasoningTrace,
    item: torch.Tensor,
    state: torch.Tensor,
    all_targets: torch.Tensor,
    shard: BatchShard,
) -> dict[str, torch.Tensor]:
    network = work.network
    local_index = work.send(shard.local_index)
    target = work.item_tokens[all_targets[local_index]]  # (b, M)
    vectors = network.item_vectors(work.item_tokens)[all_targets]  # (B, D)
    group = item.shape[1]
    given = target.unsqueeze(1).expand(-1, group, -1)
    reasoned = predict_items(work, decode_items(network, cross, trace, given)[0]).of(given).sum(-1)
    directly, _ = decode_directly(network, cross, work.vocabulary.start_tokens[0], target.unsqueeze(1))
    direct = predict_items(work, directly).of(target.unsqueeze(1)).sum((1, 2))
    return {
        "format": rewards.format_reward(are_items(item, work.item_tokens)),
        "match": rewards.match_reward(item, target),
        "similarity": rewards.similarity_reward(state, vectors[local_index]),
        "likelihood": rewards.likelihood_reward(reasoned, direct),
        "rank": rewards.rank_reward(dense_logits(state, vectors), all_targets, local_index),
    }


def draw(logits: torch.Tensor, shard: BatchShard = WHOLE_BATCH) -> torch.Tensor:
    """One sample per row: the first token where the summed probability exceeds a uniform number. (B, G, V) -> (B, G).

    One number per row, and not torch.multinomial: a row's sample must not depend on the rows that are drawn with it.
    """
    summed = logits.float().softmax(-1).cumsum(-1)
    number = send(shard.rand(*logits.shape[:-1]), logits.device).unsqueeze(-1) * summed[..., -1:]
    return torch.searchsorted(summed, number, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
