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
from training.stages.losses import token_log_probs
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
    network, temperature = work.network, work.settings.temperature
    lo, hi = work.vocabulary.reasoning_range
    trace = reason(
        network, cross, work.vocabulary.start_tokens[steps], steps,
        lambda _, logits, __: draw(logits[..., lo:hi] / temperature, shard) + lo, paths=config.group,
    )  # fmt: skip
    batch, levels = len(cross.mask), work.item_tokens.shape[1]
    item = torch.zeros(batch, config.group, levels, dtype=torch.int64, device=work.device)
    for level in range(levels):
        logits, state = decode_items(network, cross, trace, item)
        item[..., level] = draw(logits[:, :, level] / temperature, shard)
    reasoning = torch.stack(trace.tokens, -1) if steps else item[..., :0]
    log_probs = _log_probs(work, trace, logits, reasoning, item)
    return Rollout(reasoning, item, log_probs, _rewards(work, cross, trace, item, state, all_targets, shard))


def policy_log_probs(work: Workspace, network: StreamRec, cross: CrossKeysValues, rollout: Rollout) -> torch.Tensor:
    """log P of a rollout's tokens under `network`, with gradient where it has any. Shape: (B, G, l + M)."""
    trace = _replay(work, network, cross, rollout.reasoning)
    logits, _ = decode_items(network, cross, trace, rollout.item)
    return _log_probs(work, trace, logits, rollout.reasoning, rollout.item)


def _replay(work: Workspace, network: StreamRec, cross: CrossKeysValues, tokens: torch.Tensor) -> ReasoningTrace:
    """Reasons with given tokens (B, G, l)."""
    _, group, steps = tokens.shape
    start_token = work.vocabulary.start_tokens[steps]
    return reason(network, cross, start_token, steps, lambda i, *_: tokens[..., i - 1], paths=group)


def _log_probs(
    work: Workspace, trace: ReasoningTrace, item_logits: torch.Tensor, reasoning: torch.Tensor, item: torch.Tensor
) -> torch.Tensor:
    """Reasoning tokens are drawn among the reasoning codes, so that is what their probabilities are normalised over."""
    lo, hi = work.vocabulary.reasoning_range
    temperature = work.settings.temperature
    parts = [
        token_log_probs(logits[..., lo:hi], reasoning[..., i] - lo, temperature)
        for i, logits in enumerate(trace.logits)
    ]
    parts = [] if work.network.step_form == "state" else parts  # no token was acted on
    return torch.cat(
        [torch.stack(parts, -1) if parts else item_logits[..., 0, :0], token_log_probs(item_logits, item, temperature)],
        -1,
    )


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
    temperature = work.settings.temperature
    reasoned = token_log_probs(decode_items(network, cross, trace, given)[0], given, temperature).sum(-1)
    direct_logits, _ = decode_directly(network, cross, work.vocabulary.start_tokens[0], target.unsqueeze(1))
    direct = token_log_probs(direct_logits, target.unsqueeze(1), temperature).sum((1, 2))
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
