"""Every reward against numbers worked out by hand, and that reinforcement learning makes each of them rise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.training.small import overfit, small_config, small_workspace
from training.stages import rewards
from training.stages.rl import RlStep
from training.stages.rollouts import policy_log_probs, sample

NAMES = ("format", "match", "similarity", "likelihood", "rank")


def test_format_by_hand():
    assert rewards.format_reward(torch.tensor([[True, False]])).tolist() == [[0.0, -1.0]]


def test_match_counts_the_correct_prefix_only():
    target = torch.tensor([[4, 5, 6]])
    written = torch.tensor([[[4, 5, 6], [4, 5, 0], [4, 0, 6], [0, 5, 6]]])
    # 3, 2, 1 and 0 of 3: what comes right after a mistake counts nothing
    torch.testing.assert_close(rewards.match_reward(written, target), torch.tensor([[1, 2 / 3, 1 / 3, 0]]))


def test_similarity_by_hand():
    state = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]]])
    found = rewards.similarity_reward(state, torch.tensor([[5.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, -1.0, math.sqrt(0.5)]]))


def test_likelihood_by_hand():
    with_reasoning, without = torch.tensor([[-1.0, -2.0, -2.0 - math.log(3)]]), torch.tensor([-2.0])
    # differences 1, 0 and -ln 3: sigmoid(-ln 3) = 1 / (1 + 3)
    expected = torch.tensor([[1 / (1 + math.exp(-1)), 0.5, 0.25]])
    torch.testing.assert_close(rewards.likelihood_reward(with_reasoning, without), expected)


def test_rank_by_hand():
    # scores of the state against the targets of rows 0, 1, 2, for G = 2 rollouts a row
    scores = torch.tensor(
        [
            [[5.0, 1.0, 1.0], [3.0, 4.0, 9.0]],  # own is the first: ranks 1 and 3
            [[7.0, 6.0, 1.0], [0.0, 2.0, 2.0]],  # own is the second: rank 2; a tie is no better: rank 1
            [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]],  # own is the third: ranks 3 and 1
        ]
    )
    expected = torch.tensor([[1, 1 / 3], [1 / 2, 1], [1 / 3, 1]])
    item = torch.tensor([10, 11, 12])
    torch.testing.assert_close(rewards.rank_reward(scores, item, torch.arange(3)), expected)
    some = torch.tensor([2, 1])  # rows of the batch whose states are computed elsewhere are left out
    torch.testing.assert_close(rewards.rank_reward(scores[some], item, some), expected[some])


def test_equal_items_are_no_negatives_in_the_rank():
    scores = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    # row 1 wants the same item as row 0: only row 2 is a negative
    assert rewards.rank_reward(scores, torch.tensor([10, 10, 12]), torch.arange(3))[0, 0] == pytest.approx(1 / 2)


@pytest.mark.parametrize("form", ["token", "state", "both"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_rollout_knows_the_probabilities_it_was_drawn_with(form, steps):
    config = small_config(f"model.step_form={form}", "model.temperature=0.7", "rl.group=5")
    work = small_workspace(config)
    work.network.eval()
    row = torch.arange(4)
    cross = work.encode([work.split.train[i] for i in range(4)])
    torch.manual_seed(0)
    rollout = sample(work, cross, row, steps, config.rl)
    assert rollout.reasoning.shape == (4, 5, steps) and rollout.item.shape == (4, 5, 3)
    lo, hi = work.vocabulary.reasoning_range
    assert ((rollout.reasoning >= lo) & (rollout.reasoning < hi)).all()
    again = policy_log_probs(work, work.network, cross, rollout)
    assert again.shape == (4, 5, 3 if form == "state" else steps + 3)
    torch.testing.assert_close(again.detach(), rollout.log_probs)
    assert set(rollout.rewards) == set(NAMES)
    assert all(value.shape == (4, 5) for value in rollout.rewards.values())


def test_rollouts_are_drawn_with_the_temperature_they_are_scored_with():
    """The share of a token among many draws is its probability."""
    config = small_config("model.temperature=0.3", "rl.group=600")
    work = small_workspace(config)
    work.network.eval()
    torch.manual_seed(0)
    rollout = sample(work, work.encode([work.split.train[0]]), torch.tensor([3]), 1, config.rl)
    for at, tokens in ((0, rollout.reasoning[0, :, 0]), (1, rollout.item[0, :, 0])):
        if at == 1:  # the item's first token depends on the reasoning token: take the commonest
            chosen = rollout.reasoning[0, :, 0] == rollout.reasoning[0, :, 0].mode().values
        else:
            chosen = torch.ones(len(tokens), dtype=torch.bool)
        commonest = tokens[chosen].mode().values
        probability = rollout.log_probs[0, chosen, at][tokens[chosen] == commonest][0].exp()
        shard = (tokens[chosen] == commonest).float().mean()
        assert float(shard) == pytest.approx(float(probability), abs=0.08)


@pytest.mark.parametrize("name", NAMES)
def test_each_reward_rises_when_it_alone_is_trained(name):
    weights = [f"rl.{other}_reward={int(other == name)}" for other in NAMES]
    config = small_config(*weights, "model.step_form=token", "rl.batch_size=8", "rl.group=16", "rl.anchor_weight=0",
                          "rl.policy_weight=1", "rl.kl_weight=0")  # fmt: skip
    work = small_workspace(config)
    values = overfit(RlStep(work, config.rl), work.network, f"reward/{name}", updates=160, lr=3e-3)
    means = np.reshape(values, (8, 20)).mean(1)  # a group's rewards are few: one update says little
    assert max(means) > means[0] + 0.08
