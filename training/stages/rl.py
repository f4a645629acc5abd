"""Stage 3: reinforcement learning by GRPO on the network's own reasoning.

[paper]: five rewards, group-relative advantages, clipped ratio, KL to stage 2.
[open]: a few updates per batch of rollouts; an anchor keeps the likelihood of the target, with and without reasoning,
because without it the policy drifts off and the direct path that the likelihood reward compares with goes untrained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from serving.network.t5 import CrossKeysValues
from training.config import RlConfig
from training.data.examples import batch_at
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import advantages, grpo, nll
from training.stages.predictions import predict_items
from training.stages.reasoning import decode_directly, decode_items, greedy, reason
from training.stages.rollouts import Rollout, policy_log_probs, sample
from training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Experience:
    """Rollouts of one micro-batch and what they are worth; `log_probs` of the rollout are those of the policy that made
    them.

    target_item: (B,) int64 item rows. advantage: (B, G). reference: (B, G, l + M) log-probabilities under the frozen
    stage-2 network.
    """

    histories: list[np.ndarray]
    target_item: torch.Tensor
    rollout: Rollout
    advantage: torch.Tensor
    reference: torch.Tensor
    terms: Terms


class RlStep:
    """Computes the loss of a step. `reference`: the network as stage 2 left it, frozen, for the KL term.

    `config.updates` steps share a batch of rollouts: from the second on the ratio differs from 1 and may be clipped.
    Checkpoints fall between such batches, so that a resumed run samples what an uninterrupted one does.
    """

    def __init__(self, work: Workspace, config: RlConfig) -> None:
        self.work, self.config = work, config
        self.kept = None
        self.reference = copy.deepcopy(work.network).eval().requires_grad_(False)
        names = ("format", "match", "similarity", "likelihood", "rank")
        self.weights = {name: getattr(config, f"{name}_reward") for name in names}
        self.experience: dict[int, Experience] = {}  # by micro-batch

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config, network = self.work, self.config, self.work.network
        network.eval()  # ratios compare policies, not dropout masks
        batch = batch_at(work.examples, config.batch_size, work.config.seed + 2, step // config.updates)
        shard = shard.of(len(batch))
        if shard.part not in self.experience or step % config.updates == 0:
            self.experience[shard.part] = self.gather(shard.micro_batch(batch), shard)
        experience = self.experience[shard.part]
        cross = work.encode(experience.histories)
        now = policy_log_probs(work, network, cross, experience.rollout)
        old, reference = experience.rollout.log_probs, experience.reference
        policy = grpo(now, old, reference, experience.advantage, config.clip, config.kl_weight)
        terms = {"policy": policy.detach(), "kl": (now - reference).detach().mean(), **experience.terms}
        loss = config.policy_weight * policy
        if config.anchor_weight:
            anchor = self.anchor(cross, experience.target_item, experience.rollout.steps)
            loss = loss + config.anchor_weight * anchor
            terms["anchor"] = anchor.detach()
        return shard.mean(loss, terms)

    @torch.no_grad()
    def gather(self, micro_batch: np.ndarray, shard: BatchShard) -> Experience:
        """Samples and rewards the local rollouts. micro_batch: its examples, on all processes."""
        work, config = self.work, self.config
        all_targets = work.send(work.examples.targets(micro_batch))
        histories, target_item = work.examples.histories(shard.local(micro_batch)), shard.local(all_targets)
        steps = work.draw_steps(shard.draws)
        cross = work.encode(histories)
        rollout = sample(work, cross, all_targets, steps, config, shard)
        reward = torch.stack([weight * rollout.rewards[name] for name, weight in self.weights.items()]).sum(0)
        before = work.with_network(self.reference).encode(histories)
        reference = policy_log_probs(work, self.reference, before, rollout)
        terms = {"reward": reward.mean(), "reward_spread": reward.std(-1).mean()}
        terms |= {f"reward/{name}": value.mean() for name, value in rollout.rewards.items()}
        return Experience(histories, target_item, rollout, advantages(reward), reference, terms)

    def anchor(self, cross: CrossKeysValues, target_item: torch.Tensor, steps: int) -> torch.Tensor:
        """NLL of the targets, without reasoning and after the network's own greedy reasoning of `steps` steps."""
        work, network = self.work, self.work.network
        target, start_tokens = work.item_tokens[target_item].unsqueeze(1), work.vocabulary.start_tokens
        direct, _ = decode_directly(network, cross, start_tokens[0], target)
        trace = reason(network, cross, start_tokens[steps], steps, greedy(network, work.vocabulary.reasoning_range))
        reasoned, _ = decode_items(network, cross, trace, target)
        smoothing = self.config.label_smoothing
        return nll(predict_items(work, direct), target, smoothing) + nll(
            predict_items(work, reasoned), target, smoothing
        )
