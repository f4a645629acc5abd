"""Rollouts of stage 3: groups of sampled reasoning and items for the same histories, with the rewards they earn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.model import Memory, StreamRec, dense_logits
from training import rewards
from training.config import RlConfig
from training.evaluate import exists
from training.losses import token_log_probs
from training.pretrain import start
from training.reasoning import Thought, answer, think
from training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Rollout:
    """G sampled outputs of B histories.

    reasoning (B, G, l) and item (B, G, M): the tokens. log_probs (B, G, l + M): of each under the policy that sampled
    it. rewards: per name (B, G).
    """

    reasoning: torch.Tensor
    item: torch.Tensor
    log_probs: torch.Tensor
    rewards: dict[str, torch.Tensor]

    @property
    def steps(self) -> int:
        return self.reasoning.shape[-1]


@torch.no_grad()
def sample(work: Workspace, memory: Memory, row: torch.Tensor, steps: int, config: RlConfig) -> Rollout:
    """Samples `config.group` outputs per history, without the trie, and rewards them. row: (B,) int64, the targets."""
    network, temperature = work.network, work.settings.temperature
    lo, hi = work.vocabulary.reasoning_range
    thought = think(network, memory, work.vocabulary.start_tokens[steps], steps,
                    lambda _, logits, __: _draw(logits[..., lo:hi] / temperature) + lo, paths=config.group)  # fmt: skip
    batch, levels = len(row), work.item_tokens.shape[1]
    item = torch.zeros(batch, config.group, levels, dtype=torch.int64)
    for level in range(levels):
        logits, state = answer(network, memory, thought, item)
        item[..., level] = _draw(logits[:, :, level] / temperature)
    reasoning = torch.stack(thought.tokens, -1) if steps else item[..., :0]
    log_probs = _log_probs(work, thought, logits, reasoning, item)
    return Rollout(reasoning, item, log_probs, _rewards(work, memory, thought, item, state, row))


def policy_log_probs(work: Workspace, network: StreamRec, memory: Memory, rollout: Rollout) -> torch.Tensor:
    """log P of a rollout's tokens under `network`, with gradient where it has any. Shape: (B, G, l + M)."""
    start_token = work.vocabulary.start_tokens[rollout.steps]
    tokens = rollout.reasoning
    thought = think(
        network, memory, start_token, rollout.steps, lambda i, *_: tokens[..., i - 1], paths=tokens.shape[1]
    )
    logits, _ = answer(network, memory, thought, rollout.item)
    return _log_probs(work, thought, logits, tokens, rollout.item)


def _log_probs(
    work: Workspace, thought: Thought, item_logits: torch.Tensor, reasoning: torch.Tensor, item: torch.Tensor
) -> torch.Tensor:
    """Reasoning tokens are drawn among the reasoning codes, so that is what their probabilities are normalised over."""
    lo, hi = work.vocabulary.reasoning_range
    temperature = work.settings.temperature
    parts = [
        token_log_probs(logits[..., lo:hi], reasoning[..., i] - lo, temperature)
        for i, logits in enumerate(thought.logits)
    ]
    parts = [] if work.network.step_form == "state" else parts  # no token was acted on
    return torch.cat(
        [torch.stack(parts, -1) if parts else item_logits[..., 0, :0], token_log_probs(item_logits, item, temperature)],
        -1,
    )


def _rewards(
    work: Workspace, memory: Memory, thought: Thought, item: torch.Tensor, state: torch.Tensor, row: torch.Tensor
) -> dict[str, torch.Tensor]:
    network = work.network
    target = work.item_tokens[row]  # (B, M)
    vectors = network.item_vectors(work.item_tokens)[row]  # (B, D)
    group = item.shape[1]
    given = target.unsqueeze(1).expand(-1, group, -1)
    temperature = work.settings.temperature
    reasoned = token_log_probs(answer(network, memory, thought, given)[0], given, temperature).sum(-1)
    direct_logits, _ = answer(network, memory, start(work, len(row), 0), target.unsqueeze(1))
    direct = token_log_probs(direct_logits, target.unsqueeze(1), temperature).sum((1, 2))
    return {
        "format": rewards.format_reward(exists(item, work.item_tokens)),
        "match": rewards.match_reward(item, target),
        "similarity": rewards.similarity_reward(state, vectors),
        "likelihood": rewards.likelihood_reward(reasoned, direct),
        "rank": rewards.rank_reward(dense_logits(state, vectors), row),
    }


def _draw(logits: torch.Tensor) -> torch.Tensor:
    """One sample per row. Shape: (..., V) -> (...)."""
    return torch.multinomial(logits.softmax(-1).flatten(0, -2), 1).view(logits.shape[:-1])
