"""Stage 3: reinforcement learning by GRPO on the network's own reasoning.

[paper]: five rewards, group-relative advantages, clipped ratio, KL to stage 2.
[open]: outputs are drawn among those that can be served; a sixth reward, what the answer as served is worth after these
thoughts; every reward is standardised by itself, for the one with the largest spread would be all that counts; a few
updates per batch of rollouts; an anchor keeps the likelihood of the target, with and without reasoning, because without
it the policy drifts off and the direct path that the likelihood reward compares with goes untrained; and the policy's
weight follows the gradients, for at a fixed one the anchor drowns it or it destroys the network.

Ratios compare policies, so they are computed without dropout; the anchor trains like stage 2, with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from training.config import RlConfig
from training.data.examples import batch_at
from training.stages.answers import mode
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import advantages, grpo, nll
from training.stages.predictions import predict_items
from training.stages.reasoning import greedy, reason, teacher_force, teacher_force_directly
from training.stages.rollouts import Rollout, policy_log_probs, sample
from training.workspace import Workspace

REWARDS = ("format", "match", "similarity", "likelihood", "rank", "answer")
MEASURE_EVERY = 10  # steps between measurements of the two gradients, which cost a backward pass each


@dataclass(frozen=True, slots=True)
class Experience:
    """Rollouts of one micro-batch and what they are worth; `log_probs` of the rollout are those of the policy that made
    them.

    times: see `Examples`. target_item: (B,) int64 item rows. advantage: (B, G). reference: (B, G, l + M)
    log-probabilities under the frozen stage-2 network.
    """

    histories: list[np.ndarray]
    times: list[np.ndarray] | None
    target_item: torch.Tensor
    rollout: Rollout
    advantage: torch.Tensor
    reference: torch.Tensor
    terms: Terms


class Balance(nn.Module):
    """The policy's weight, and the norms of both gradients when they were last measured. Checkpoints contain it."""

    weight: torch.Tensor
    policy: torch.Tensor
    anchor: torch.Tensor

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.register_buffer("policy", torch.zeros(()))
        self.register_buffer("anchor", torch.zeros(()))

    def follow(self, policy: torch.Tensor, anchor: torch.Tensor, share: float, at_once: bool) -> None:
        """Takes the norms of the unweighted policy's and the anchor's gradient. The weight moves, `at_once` or half the
        way (as a factor), to where the policy's gradient is `share` of the anchor's. Where one is 0 it stays.
        """
        self.policy.copy_(policy)
        self.anchor.copy_(anchor)
        wanted = (share * anchor / policy.clamp(min=1e-12)).clamp(max=1000)
        moved = wanted if at_once else (self.weight * wanted).sqrt()
        self.weight.copy_(torch.where((policy > 0) & (anchor > 0), moved, self.weight))


class RlStep:
    """Computes the loss of a step. `reference`: the network as stage 2 left it, frozen, for the KL term.

    `config.updates` steps share a batch of rollouts: from the second on the ratio differs from 1 and may be clipped.
    Checkpoints fall between such batches, so that a resumed run samples what an uninterrupted one does.
    """

    def __init__(self, work: Workspace, config: RlConfig) -> None:
        self.work, self.config = work, config
        self.reference = copy.deepcopy(work.network).eval().requires_grad_(False)
        self.kept = Balance(config.policy_weight).to(work.device)
        self.weights = {name: getattr(config, f"{name}_reward") for name in REWARDS}
        self.experience: dict[int, Experience] = {}  # by micro-batch

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config, network = self.work, self.config, self.work.network
        batch = batch_at(work.examples, config.batch_size, work.config.seed + 2, step // config.updates)
        shard = shard.of(len(batch))
        with mode(network, training=False):
            if shard.part not in self.experience or step % config.updates == 0:
                self.experience[shard.part] = self.gather(shard.micro_batch(batch), shard)
            experience = self.experience[shard.part]
            cross = work.encode(experience.histories, experience.times)
            now = policy_log_probs(work, network, cross, experience.rollout, config)
        old, reference = experience.rollout.log_probs, experience.reference
        policy = grpo(now, old, reference, experience.advantage, config.clip, config.kl_weight)
        terms = {"policy": policy.detach(), "kl": (now - reference).detach().mean(), **experience.terms}
        if not config.anchor_weight:
            return shard.mean(config.policy_weight * policy, terms)
        with mode(network, training=True):
            anchor = config.anchor_weight * self.anchor(experience)
        terms["anchor"] = anchor.detach() / config.anchor_weight
        if not (config.policy_share and config.policy_weight):
            return shard.mean(config.policy_weight * policy + anchor, terms)
        if step % MEASURE_EVERY == 0 and shard.part == 0:
            of_policy, of_anchor = (gradient_norm(network, loss, shard) for loss in (policy, anchor))
            self.kept.follow(of_policy, of_anchor, config.policy_share, at_once=step == 0)
        weight = self.kept.weight.clone()
        terms |= {"policy_weight": weight, "gradient/policy": weight * self.kept.policy}
        terms["gradient/anchor"] = self.kept.anchor.clone()
        return shard.mean(weight * policy + anchor, terms)

    @torch.no_grad()
    def gather(self, micro_batch: np.ndarray, shard: BatchShard) -> Experience:
        """Samples and rewards the local rollouts. micro_batch: its examples, on all processes."""
        work, config = self.work, self.config
        all_targets = work.send(work.examples.targets(micro_batch))
        local, target_item = shard.local(micro_batch), shard.local(all_targets)
        histories, times = work.examples.histories(local), work.examples.times_of(local)
        steps = work.draw_steps(shard.draws)
        cross = work.encode(histories, times)
        rollout = sample(work, cross, all_targets, steps, config, shard)
        weighted = [weight * rollout.rewards[name] for name, weight in self.weights.items()]
        if config.standardise == "each":
            pairs = [(weight, advantages(rollout.rewards[name])) for name, weight in self.weights.items()]
            advantage = torch.stack([weight * each for weight, each in pairs]).sum(0)
        else:
            advantage = advantages(torch.stack(weighted).sum(0))
        reward = torch.stack(weighted).sum(0)
        before = work.with_network(self.reference).encode(histories, times)
        reference = policy_log_probs(work, self.reference, before, rollout, config)
        terms = {"reward": reward.mean(), "reward_spread": reward.std(-1).mean()}
        terms |= {f"reward/{name}": value.mean() for name, value in rollout.rewards.items()}
        return Experience(histories, times, target_item, rollout, advantage, reference, terms)

    def anchor(self, experience: Experience) -> torch.Tensor:
        """NLL of the targets, without reasoning and after the network's own greedy reasoning of as many steps."""
        work, network, steps = self.work, self.work.network, experience.rollout.steps
        cross = work.encode(experience.histories, experience.times)
        target, start_tokens = work.item_tokens[experience.target_item].unsqueeze(1), work.vocabulary.start_tokens
        direct, _ = teacher_force_directly(network, cross, start_tokens[0], target)
        trace = reason(network, cross, start_tokens[steps], steps, greedy(network, work.vocabulary.reasoning_range))
        reasoned, _ = teacher_force(network, cross, trace, target)
        each = [nll(predict_items(work, hidden), target, self.config.label_smoothing) for hidden in (direct, reasoned)]
        return each[0] + each[1]


def gradient_norm(network: nn.Module, loss: torch.Tensor, shard: BatchShard) -> torch.Tensor:
    """Of a loss over the micro-batch's rows, on all processes. The graph is kept. A scalar."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    own, _ = shard.mean(loss, {})
    gradients = torch.autograd.grad(own, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
    norm: torch.Tensor = shard.sum(torch.cat([gradient.flatten() for gradient in gradients])).norm()
    return norm
