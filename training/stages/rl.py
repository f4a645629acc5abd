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
from training.stages.examples import batch_at
from training.stages.losses import advantages, grpo, nll
from training.stages.pretrain import start
from training.stages.ranks import WHOLE, Share, Terms
from training.stages.reasoning import answer, think
from training.stages.rollouts import Rollout, policy_log_probs, sample
from training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Experience:
    """Rollouts of one batch and what they are worth; `log_probs` of the rollout are those of the policy that made them.

    row: (B,) targets. advantage: (B, G). reference: (B, G, l + M) log-probabilities under the frozen stage-2 network.
    """

    histories: list[np.ndarray]
    row: torch.Tensor
    rollout: Rollout
    advantage: torch.Tensor
    reference: torch.Tensor
    terms: Terms


class RlStep:
    """Makes the loss of a step. `reference` is the network that stage 2 left, frozen: the KL term holds on to it.

    `config.updates` steps share a batch of rollouts: from the second on the ratio differs from 1 and may be clipped.
    Checkpoints fall between such batches, so that a resumed run samples what an undisturbed one does.
    """

    def __init__(self, work: Workspace, config: RlConfig) -> None:
        self.work, self.config = work, config
        self.reference = copy.deepcopy(work.network).eval().requires_grad_(False)
        names = ("format", "match", "similarity", "likelihood", "rank")
        self.weights = {name: getattr(config, f"{name}_reward") for name in names}
        self.experience: dict[int, Experience] = {}  # of each part of the batch

    def __call__(self, step: int, share: Share = WHOLE) -> tuple[torch.Tensor, Terms]:
        work, config, network = self.work, self.config, self.work.network
        network.eval()  # ratios compare policies, not dropout masks
        batch = batch_at(work.examples, config.batch_size, work.config.seed + 2, step // config.updates)
        share = share.of(len(batch))
        if share.part not in self.experience or step % config.updates == 0:
            self.experience[share.part] = self.gather(share.piece(batch), share)
        known = self.experience[share.part]
        memory = work.read(known.histories)
        now = policy_log_probs(work, network, memory, known.rollout)
        policy = grpo(now, known.rollout.log_probs, known.reference, known.advantage, config.clip, config.kl_weight)
        terms = {"policy": policy.detach(), "kl": (now - known.reference).detach().mean(), **known.terms}
        loss = config.policy_weight * policy
        if config.anchor_weight:
            anchor = self.anchor(memory, known.row, known.rollout.steps)
            loss = loss + config.anchor_weight * anchor
            terms["anchor"] = anchor.detach()
        return share.mean(loss, terms)

    @torch.no_grad()
    def gather(self, piece: np.ndarray, share: Share) -> Experience:
        """Makes and judges the own rollouts of a part of a batch. piece: its examples, on all ranks."""
        work, config = self.work, self.config
        everyone = work.send(work.examples.targets(piece))
        histories, row = work.examples.histories(share.own(piece)), share.own(everyone)
        steps = work.draw_steps(share.draws)
        memory = work.read(histories)
        rollout = sample(work, memory, everyone, steps, config, share)
        reward = torch.stack([weight * rollout.rewards[name] for name, weight in self.weights.items()]).sum(0)
        before = work.with_network(self.reference).read(histories)
        reference = policy_log_probs(work, self.reference, before, rollout)
        terms = {"reward": reward.mean(), "reward_spread": reward.std(-1).mean()}
        terms |= {f"reward/{name}": value.mean() for name, value in rollout.rewards.items()}
        return Experience(histories, row, rollout, advantages(reward), reference, terms)

    def anchor(self, memory: CrossKeysValues, row: torch.Tensor, steps: int) -> torch.Tensor:
        """NLL of the targets, without reasoning and after the network's own greedy reasoning of `steps` steps."""
        work, network = self.work, self.work.network
        target = work.item_tokens[row].unsqueeze(1)
        lo, hi = work.vocabulary.reasoning_range
        direct, _ = answer(network, memory, start(work, len(row), 0), target)
        thought = think(
            network, memory, work.vocabulary.start_tokens[steps], steps,
            lambda _, logits, __: logits[..., lo:hi].argmax(-1) + lo,
        )  # fmt: skip
        reasoned, _ = answer(network, memory, thought, target)
        temperature, smoothing = work.settings.temperature, self.config.label_smoothing
        return nll(direct, target, temperature, smoothing) + nll(reasoned, target, temperature, smoothing)
