"""Rollouts of stage 3: groups of reasoning and items for the same histories, with the rewards they earn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.network.model import StreamRec, dense_logits
from serving.network.t5 import CrossKeysValues
from training.config import RlConfig
from training.stages import rewards
from training.stages.answers import answers_after
from training.stages.diagnostics import are_items
from training.stages.distributed import WHOLE_BATCH, BatchShard
from training.stages.predictions import Predictions, predict_items, predict_reasoning
from training.stages.reasoning import ReasoningTrace, reason, teacher_force, teacher_force_directly
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
    """Samples `config.group` outputs per history, inside the trie or (`inside_trie` false) anywhere, and rewards them.

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
    node = item[..., 0]  # the root
    for level in range(levels):
        hidden, state = teacher_force(network, cross, trace, item)
        predictions = predict_items(work, hidden)
        if config.inside_trie:
            log_probs, child = permitted(work, predictions, node, level)
            chosen = draw(log_probs, shard).unsqueeze(-1)
            node = child.gather(-1, chosen).squeeze(-1).long()
            item[..., level] = work.trie.token[node]
        else:
            item[..., level] = draw(predictions.log_probs[level], shard) + predictions.first[level]
    reasoning = torch.stack(trace.tokens, -1) if steps else item[..., :0]
    of_tokens = _log_probs(work, trace, hidden, reasoning, item, config)
    return Rollout(reasoning, item, of_tokens, _rewards(work, cross, trace, reasoning, item, state, all_targets, shard))


def policy_log_probs(
    work: Workspace, network: StreamRec, cross: CrossKeysValues, rollout: Rollout, config: RlConfig
) -> torch.Tensor:
    """log P of a rollout's tokens under `network`, with gradient where it has any. Shape: (B, G, l + M)."""
    tokens = rollout.reasoning
    start_token = work.vocabulary.start_tokens[rollout.steps]
    trace = reason(
        network, cross, start_token, rollout.steps, lambda i, *_: tokens[..., i - 1], paths=tokens.shape[1]
    )  # fmt: skip
    hidden, _ = teacher_force(network, cross, trace, rollout.item)
    return _log_probs(work.with_network(network), trace, hidden, tokens, rollout.item, config)


def _log_probs(
    work: Workspace,
    trace: ReasoningTrace,
    item_hidden: torch.Tensor,
    reasoning: torch.Tensor,
    item: torch.Tensor,
    config: RlConfig,
) -> torch.Tensor:
    """Every token's probability is normalised over what it was drawn among: the reasoning codes, and a node's children
    or, outside of the trie, what `predictions` says.
    """
    predictions = predict_items(work, item_hidden)
    of_item = path_log_probs(work, predictions, item) if config.inside_trie else predictions.of(item)
    if work.network.step_form == "state" or not trace.steps:  # no token was acted on
        return of_item
    return torch.cat([predict_reasoning(work, trace.hidden).of(reasoning), of_item], -1)


def permitted(
    work: Workspace, predictions: Predictions, node: torch.Tensor, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P among the children of nodes of the trie, -inf where there is none, and the children.

    Shape: node (B, G) -> (B, G, C) both.
    """
    log_probs, first = predictions.log_probs[level], predictions.first[level]
    scores, child = work.trie.expand(log_probs, node, level, first_id=first)
    return scores.log_softmax(-1), child


def path_log_probs(work: Workspace, predictions: Predictions, item: torch.Tensor) -> torch.Tensor:
    """log P of an item's tokens, each among those that the trie permits after the ones before it. Shape: (B, G, M)."""
    node, found = torch.zeros_like(item[..., 0]), []
    for level in range(item.shape[-1]):
        log_probs, child = permitted(work, predictions, node, level)
        taken = (work.trie.token[child] == item[..., level, None]) & log_probs.isfinite()
        index = taken.int().argmax(-1, keepdim=True)
        found.append(log_probs.gather(-1, index))
        node = child.gather(-1, index).squeeze(-1).long()
    return torch.cat(found, -1)


def _rewards(
    work: Workspace,
    cross: CrossKeysValues,
    trace: ReasoningTrace,
    reasoning: torch.Tensor,
    item: torch.Tensor,
    state: torch.Tensor,
    all_targets: torch.Tensor,
    shard: BatchShard,
) -> dict[str, torch.Tensor]:
    network = work.network
    local_index = work.send(shard.local_index)
    target_item = all_targets[local_index]  # (b,)
    target = work.item_tokens[target_item]  # (b, M)
    vectors = network.item_vectors(work.item_tokens)[all_targets]  # (B, D)
    group = item.shape[1]
    given = target.unsqueeze(1).expand(-1, group, -1)
    reasoned = predict_items(work, teacher_force(network, cross, trace, given)[0]).of(given).sum(-1)
    directly, _ = teacher_force_directly(network, cross, work.vocabulary.start_tokens[0], target.unsqueeze(1))
    direct = predict_items(work, directly).of(target.unsqueeze(1)).sum((1, 2))
    return {
        "format": rewards.format_reward(are_items(item, work.item_tokens)),
        "match": rewards.match_reward(item, target),
        "similarity": rewards.similarity_reward(state, vectors[local_index]),
        "likelihood": rewards.likelihood_reward(reasoned, direct),
        "rank": rewards.rank_reward(dense_logits(state, vectors), all_targets, local_index),
        "answer": rewards.answer_reward(answers_after(work, cross, reasoning), target_item),
    }


def draw(logits: torch.Tensor, shard: BatchShard = WHOLE_BATCH) -> torch.Tensor:
    """One sample per row: the first token where the summed probability exceeds a uniform number. (B, G, V) -> (B, G).

    One number per row, and not torch.multinomial: a row's sample must not depend on the rows that are drawn with it.
    """
    summed = logits.float().softmax(-1).cumsum(-1)
    number = send(shard.rand(*logits.shape[:-1]), logits.device).unsqueeze(-1) * summed[..., -1:]
    return torch.searchsorted(summed, number, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
