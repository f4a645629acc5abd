"""Every reward against numbers worked out by hand, and that reinforcement learning raises each of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.training.small import overfit, small_config, small_workspace
from training.stages import rewards
from training.stages.answers import answers_after
from training.stages.distributed import BatchShard
from training.stages.pretrain import PretrainStep
from training.stages.rl import RlStep
from training.stages.rollouts import Rollout, draw, policy_log_probs, sample

NAMES = ("format", "match", "similarity", "likelihood", "rank", "answer")


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


def test_answer_by_hand():
    served = torch.tensor([[[7, 8, 9], [8, 7, 9], [9, 8, 7], [9, 8, -1]]])
    # first, second and third place, and none: 1, 1 / log2(3), 1 / 2 and 0
    found = rewards.answer_reward(served, torch.tensor([7]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / math.log2(3), 0.5, 0.0]]))


@pytest.mark.parametrize("form", ["token", "state", "both"])
@torch.no_grad()
def test_the_answer_after_the_searchs_own_thoughts_is_the_searchs(form):
    work = small_workspace(small_config(f"model.step_form={form}"))
    ranker = work.ranker()
    batch = ranker.encode(work.split.valid_history[:6])
    found = ranker.search(batch, 2, 10)
    tokens = found.reasoning_tokens if form != "state" else torch.zeros(6, 1, 2, dtype=torch.int64)
    both = torch.cat([tokens, tokens], 1)  # a group of two
    for path in answers_after(work, batch.cross, both).unbind(1):
        assert torch.equal(path, found.items)


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
@pytest.mark.parametrize("inside", ["true", "false"])
def test_a_rollout_knows_the_probabilities_it_was_drawn_with(form, steps, inside):
    config = small_config(f"model.step_form={form}", "model.temperature=0.7", "rl.group=5", f"rl.inside_trie={inside}")
    work = small_workspace(config)
    work.network.eval()
    row = torch.arange(4)
    cross = work.encode([work.split.train[i] for i in range(4)])
    torch.manual_seed(0)
    rollout = sample(work, cross, row, steps, config.rl)
    assert rollout.reasoning.shape == (4, 5, steps) and rollout.item.shape == (4, 5, 3)
    lo, hi = work.vocabulary.reasoning_range
    assert ((rollout.reasoning >= lo) & (rollout.reasoning < hi)).all()
    again = policy_log_probs(work, work.network, cross, rollout, config.rl)
    assert again.shape == (4, 5, 3 if form == "state" else steps + 3)
    torch.testing.assert_close(again.detach(), rollout.log_probs)
    assert bool((rollout.rewards["format"] == 0).all()) == (inside == "true")  # what it draws can be served
    assert set(rollout.rewards) == set(NAMES)
    assert all(value.shape == (4, 5) for value in rollout.rewards.values())


def test_rollouts_are_drawn_with_the_temperature_they_are_scored_with():
    """The share of a token among many draws is its probability."""
    # 40 times the same history: memory grows with the square of the group, since its outputs share one attention mask.
    config = small_config("model.temperature=0.3", "rl.group=100")
    work = small_workspace(config)
    work.network.eval()
    torch.manual_seed(0)
    rollout = sample(work, work.encode([work.split.train[0]] * 40), torch.full((40,), 3), 1, config.rl)
    reasoning, item, log_probs = (
        rollout.reasoning.flatten(),
        rollout.item[..., 0].flatten(),
        rollout.log_probs.flatten(0, 1),
    )
    for at, tokens in ((0, reasoning), (1, item)):
        if at == 1:  # the item's first token depends on the reasoning token: take the commonest
            chosen = reasoning == reasoning.mode().values
        else:
            chosen = torch.ones(len(tokens), dtype=torch.bool)
        commonest = tokens[chosen].mode().values
        probability = log_probs[chosen, at][tokens[chosen] == commonest][0].exp()
        shard = (tokens[chosen] == commonest).float().mean()
        assert float(shard) == pytest.approx(float(probability), abs=0.05)  # 2.5 standard errors and more


def test_a_number_that_rounds_to_1_draws_the_last_token():
    class AlmostOne(BatchShard):
        rand = staticmethod(torch.ones)

    assert draw(torch.zeros(2, 3, 5), AlmostOne()).tolist() == [[4] * 3] * 2


@torch.no_grad()
def test_inside_the_trie_the_probabilities_of_all_items_add_up_to_1():
    work = small_workspace(small_config())
    work.network.eval()
    cross = work.encode([work.split.train[0], work.split.train[1]])
    everything = work.item_tokens.expand(2, -1, -1)
    rollout = Rollout(everything[..., :0], everything, torch.empty(0), {})

    def sums(inside: str) -> torch.Tensor:
        config = small_config(f"rl.inside_trie={inside}")
        return policy_log_probs(work, work.network, cross, rollout, config.rl).sum(-1).exp().sum(-1)

    torch.testing.assert_close(sums("true"), torch.ones(2))
    assert (sums("false") < 0.9).all()  # the rest is of IDs that no item has


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_that_is_trained_alone_makes_the_outputs_it_likes_likelier(name):
    """Twenty updates on one batch of rollouts: the reward of an output that the policy would now write, by importance
    weights over the rollouts, rises by a good part of what rewards vary. No new sample and no rounding decides it."""
    assert np.mean([gain_by_training(name, seed) for seed in range(2)]) > 0.15  # measured: 0.3 and more of each


def gain_by_training(name: str, seed: int) -> float:
    """What the expected reward gains, in standard deviations of the rewards of a group."""
    weights = [f"rl.{other}_reward={int(other == name)}" for other in NAMES]
    config = small_config(*weights, "model.step_form=token", "lengths=[2]", "rl.batch_size=8", "rl.group=64",
                          "rl.anchor_weight=0", "rl.policy_weight=1", "rl.kl_weight=0", "rl.updates=20",
                          "rl.checkpoint_every=20", f"rl.inside_trie={str(name != 'format').lower()}")  # fmt: skip
    work = small_workspace(config, seed)
    overfit(PretrainStep(work, config.pretrain), work.network, "nll", updates=20)  # so that some outputs are items
    torch.manual_seed(seed)
    step = RlStep(work, config.rl)
    optimiser = torch.optim.Adam(work.network.parameters(), lr=3e-3)

    @torch.no_grad()
    def expected() -> float:
        now = policy_log_probs(work, work.network, work.encode(known.histories), known.rollout, config.rl)
        shares = (now - known.rollout.log_probs).sum(-1).softmax(-1)
        return float((shares * known.rollout.rewards[name]).sum(-1).mean())

    for update in range(20):
        loss, _ = step(update)
        if update == 0:
            known = step.experience[0]
            before = expected()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (expected() - before) / float(known.rollout.rewards[name].std(-1).mean())
