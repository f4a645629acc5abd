"""Stage 3: reinforcement learning by GRPO on sampled reasoning.

[paper]: five rewards, group-relative advantages, clipped ratio, KL to stage 2.
[open]: one update per group of rollouts; an anchor keeps the likelihood of the target, with and without reasoning,
because without it the policy drifts off and the direct path that the likelihood reward compares with goes untrained.
"""

from __future__ import annotations

import copy

import torch

from training.config import RlConfig
from training.examples import batch_at
from training.losses import advantages, grpo, nll
from training.pretrain import start
from training.reasoning import answer, think
from training.rollouts import policy_log_probs, sample
from training.workspace import Workspace


class RlStep:
    """Makes the loss of a step. `reference` is the network that stage 2 left, frozen: the KL term holds on to it."""

    def __init__(self, work: Workspace, config: RlConfig) -> None:
        self.work, self.config = work, config
        self.reference = copy.deepcopy(work.network).eval().requires_grad_(False)
        names = ("format", "match", "similarity", "likelihood", "rank")
        self.weights = {name: getattr(config, f"{name}_reward") for name in names}

    def __call__(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        work, config, network = self.work, self.config, self.work.network
        index = batch_at(work.examples, config.batch_size, work.config.seed + 2, step)
        histories = work.examples.histories(index)
        row = torch.from_numpy(work.examples.targets(index))
        steps = int(torch.randint(1, work.vocabulary.max_steps + 1, ()))
        network.eval()  # ratios compare policies, not dropout masks
        memory = work.read(histories)
        rollout = sample(work, memory, row, steps, config)
        reward = torch.stack([weight * rollout.rewards[name] for name, weight in self.weights.items()]).sum(0)
        advantage = advantages(reward)
        with torch.no_grad():
            reading = copy.copy(work)
            reading.network = self.reference
            reference = policy_log_probs(work, self.reference, reading.read(histories), rollout)
        now = policy_log_probs(work, network, memory, rollout)
        policy = grpo(now, rollout.log_probs, reference, advantage, config.clip, config.kl_weight)
        loss = config.policy_weight * policy
        terms = {
            "policy": float(policy.detach()),
            "reward": float(reward.mean()),
            "reward_spread": float(reward.std(-1).mean()),
        }
        terms |= {f"reward/{name}": float(value.mean()) for name, value in rollout.rewards.items()}
        terms["kl"] = float((now - reference).detach().mean())
        if config.anchor_weight:
            target = work.item_tokens[row].unsqueeze(1)
            lo, hi = work.vocabulary.reasoning_range
            direct, _ = answer(network, memory, start(work, len(row), 0), target)
            thought = think(network, memory, work.vocabulary.start_tokens[steps], steps,
                            lambda _, logits, __: logits[..., lo:hi].argmax(-1) + lo)  # fmt: skip
            reasoned, _ = answer(network, memory, thought, target)
            temperature = work.settings.temperature
            anchor = nll(direct, target, temperature) + nll(reasoned, target, temperature)
            loss = loss + config.anchor_weight * anchor
            terms["anchor"] = float(anchor.detach())
        return loss, terms
