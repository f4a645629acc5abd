"""The step of every stage: its losses fall when trained, in every form, and nothing leaks into its inputs."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.network.model import StreamRec
from serving.network.t5 import CrossKeysValues
from tests.training.small import overfit, small_config, small_workspace
from training.evaluate import validate
from training.stages import pretrain
from training.stages.answers import mode, rivals
from training.stages.losses import advantages, nll
from training.stages.predictions import Predictions
from training.stages.pretrain import PretrainStep
from training.stages.reasoning import reason, teacher_force_directly
from training.stages.rl import REWARDS, Balance, RlStep
from training.stages.rollouts import policy_log_probs
from training.stages.sft import Labeller, SftStep

LITERAL = Path(__file__).parents[3] / "training/literal.yaml"
SILENT = [f"sft.{name}_weight=0" for name in ("plain", "answer", "reasoning", "state", "quantization", "preference")]

Decoded = tuple[torch.Tensor, torch.Tensor]
NO_REWARD = [f"rl.{name}_reward=0" for name in REWARDS]


def fell(values: list[float], share: float = 0.8) -> bool:
    return all(map(math.isfinite, values)) and np.mean(values[-3:]) < share * np.mean(values[:3])


def same_network(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("term", ["nll", "nll_similar"])
def test_stage_1_falls(term):
    config = small_config("pretrain.batch_size=24")
    work = small_workspace(config)
    assert fell(overfit(PretrainStep(work, config.pretrain), work.network, term))


def test_stage_1_is_the_weighted_sum_of_what_it_logs():
    config = small_config("pretrain.plain_weight=2", "pretrain.similar_weight=0.5")
    loss, terms = PretrainStep(small_workspace(config), config.pretrain)(0)
    assert float(loss.detach()) == pytest.approx(float(2 * terms["nll"] + 0.5 * terms["nll_similar"]), rel=1e-5)


def test_stage_1_writes_whole_similar_items_before_the_target(monkeypatch):
    config = small_config("pretrain.similar_items=2", "pretrain.neighbours=4", "pretrain.plain_weight=0")
    work = small_workspace(config)
    seen: list = []

    def seen_decode(network: StreamRec, cross: CrossKeysValues, start_token: int, item: torch.Tensor) -> Decoded:
        seen.append(start_token)
        return teacher_force_directly(network, cross, start_token, item)

    def seen_nll(predictions: Predictions, tokens: torch.Tensor, *how: float) -> torch.Tensor:
        seen.append(tokens)
        return nll(predictions, tokens, *how)

    monkeypatch.setattr(pretrain, "teacher_force_directly", seen_decode)
    monkeypatch.setattr(pretrain, "nll", seen_nll)
    step = PretrainStep(work, config.pretrain)
    step(3)
    start_token, sequence = seen
    assert start_token not in work.vocabulary.start_tokens  # it would teach that number of steps to write item codes
    assert sequence.shape[1:] == (1, 9)  # two items of three tokens, then the target's
    rows = {tuple(tokens): row for row, tokens in enumerate(work.item_tokens.tolist())}
    for tokens in sequence[:, 0].tolist():
        first, second, target = (rows[tuple(tokens[at : at + 3])] for at in (0, 3, 6))
        assert len({first, second, target}) == 3
        assert {first, second} <= set(step.nearest[target].tolist())


def test_stage_1_leaves_the_start_tokens_of_all_steps_above_0_alone():
    work = small_workspace(small_config("pretrain.similar_weight=1"))
    loss, _ = PretrainStep(work, work.config.pretrain)(0)
    loss.backward()
    gradient = work.network.t5.shared.weight.grad
    assert gradient is not None
    touched = gradient.abs().sum(1)[work.vocabulary.start_tokens] > 0
    assert touched.tolist() == [True] + [False] * work.vocabulary.max_steps


def test_stage_1_without_similar_items_is_a_plain_tiger():
    config = small_config("pretrain.similar_weight=0")
    work = small_workspace(config)
    loss, terms = PretrainStep(work, config.pretrain)(0)
    assert set(terms) == {"nll"} and float(loss.detach()) == pytest.approx(float(terms["nll"]))


@pytest.mark.parametrize(
    ("name", "term", "settings"),
    [
        ("plain", "nll_plain", ()),
        ("answer", "nll_answer", ()),
        ("reasoning", "nll_reasoning", ("sft.labels=random",)),
        ("reasoning", "nll_reasoning", ("sft.labels=residual",)),
        ("quantization", "quantization", ()),
        ("state", "state", ("sft.state_loss=contrastive",)),
        ("state", "state", ("sft.state_loss=full_softmax",)),
        ("preference", "preference", ()),
    ],
)
def test_each_loss_of_stage_2_falls_when_it_alone_is_trained(name, term, settings):
    config = small_config(*SILENT, f"sft.{name}_weight=1", "sft.batch_size=24", "sft.preference_after=0", *settings)
    work = small_workspace(config)
    step = SftStep(work, config.sft)
    values = overfit(step, work.network, term)
    assert fell(values)
    assert set(step(0)[1]) == {term}


@pytest.mark.parametrize("form", ["token", "state", "both"])
@pytest.mark.parametrize("labels", ["residual", "random", "pause"])
@pytest.mark.parametrize("inputs", ["own", "label"])
def test_stage_2_learns_to_answer_in_every_form(form, labels, inputs):
    config = small_config(
        f"model.step_form={form}", f"sft.labels={labels}", f"sft.inputs={inputs}", "sft.batch_size=24"
    )
    work = small_workspace(config)
    step = SftStep(work, config.sft)
    values = overfit(step, work.network, "nll_answer", updates=25)
    assert fell(values)
    terms = step(0)[1]
    assert ("nll_reasoning" in terms) == (form != "state")
    assert ("quantization" in terms) == (form != "state" and labels == "residual")


def test_stage_2_is_the_weighted_sum_of_what_it_logs():
    config = small_config("sft.preference_weight=0.7", "sft.preference_after=0")
    step = SftStep(small_workspace(config), config.sft)
    loss, terms = step(0)
    names = {"nll_plain": "plain", "nll_answer": "answer", "nll_reasoning": "reasoning"}
    expected = sum(getattr(config.sft, f"{names.get(term, term)}_weight") * value for term, value in terms.items())
    assert len(terms) == 6
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_run_without_reasoning_trains_only_the_direct_answer_and_its_state():
    config = small_config("lengths=[0]")
    _, terms = SftStep(small_workspace(config), config.sft)(0)
    assert terms.keys() == {"nll_plain", "state"}


def test_a_run_draws_its_numbers_of_steps_from_lengths():
    config = small_config("model.max_steps=8", "lengths=[3,5]")
    work = small_workspace(config)
    draws = torch.Generator().manual_seed(0)
    assert {work.draw_steps(draws) for _ in range(40)} == {3, 5}


def test_the_preference_starts_at_ln_2_and_its_reference_does_not_move():
    config = small_config(*SILENT, "sft.plain_weight=1", "sft.preference_weight=1", "sft.preference_after=2")
    work = small_workspace(config)
    step = SftStep(work, config.sft)
    optimiser = torch.optim.Adam(work.network.parameters(), lr=1e-2)
    for number in range(4):
        before = copy.deepcopy(work.network)
        loss, terms = step(number)
        if number < 2:
            assert "preference" not in terms
        if number == 2:  # dropout is off here, so nothing has changed since
            assert float(terms["preference"]) == pytest.approx(math.log(2), abs=1e-4)
            reference = before
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert step.reference is not None and same_network(step.reference, reference)
    assert not same_network(reference, small_workspace(config).network)  # it is not stage 1's


def test_the_preference_is_for_the_reasoning_and_the_target_over_what_the_direct_path_prefers():
    config = small_config(*SILENT, "sft.preference_weight=1", "sft.preference_after=0", "model.step_form=token")
    work = small_workspace(config)
    histories, target = work.split.valid_history, torch.from_numpy(work.split.valid_target).long()
    work.network.train()
    found = rivals(work, work.encode(histories), target)
    assert work.network.training  # as it was
    best = torch.from_numpy(work.ranker().rank(histories, 0, 10)[:, :2])
    assert torch.equal(found, torch.where(best[:, 0] == target, best[:, 1], best[:, 0]))
    assert (best[:, 0] == target).any() and not (found == target).any()
    torch.manual_seed(0)
    SftStep(work, config.sft)(0)[0].backward()
    gradient = work.network.t5.shared.weight.grad
    assert gradient is not None
    lo, hi = work.vocabulary.reasoning_range
    assert (gradient[lo:hi].abs().sum(1) > 0).all()  # log P(o | x) is part of it, and so is every code it competes with


def test_labels_are_made_from_the_items_own_vector():
    config = small_config(*SILENT, "sft.quantization_weight=1", "sft.batch_size=24")

    def loss(moved: bool) -> torch.Tensor:
        work = small_workspace(config)
        if moved:
            torch.nn.init.normal_(work.network.heads.item_free.weight, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)  # draws the length
        return SftStep(work, config.sft)(0)[1]["quantization"]

    assert loss(moved=False) == loss(moved=False) != loss(moved=True)


@pytest.mark.parametrize(("inputs", "leaks"), [("own", False), ("label", True)])
def test_labels_as_input_leak_the_target_and_own_tokens_do_not(inputs, leaks):
    config = small_config(f"sft.inputs={inputs}", "model.reasoning_codes=12", "sft.balanced=false")
    work = small_workspace(config)
    histories = [work.split.train[i] for i in range(12)]
    cross = work.encode(histories)
    targets = work.network.item_vectors(work.item_tokens).detach()
    fed = []
    for rows in (slice(0, 12), slice(12, 24)):
        labeller = Labeller(work, config.sft, targets[rows])
        trace = reason(work.network, cross, work.vocabulary.start_tokens[2], 2, labeller.choose)
        fed.append(torch.stack(trace.tokens))
        if leaks:
            assert torch.equal(torch.stack(labeller.labels), fed[-1][..., 0])
    assert torch.equal(*fed) != leaks


def test_the_pause_control_feeds_one_token_every_time():
    config = small_config("sft.labels=pause")
    work = small_workspace(config)
    labeller = Labeller(work, config.sft, work.network.item_vectors(work.item_tokens)[:4])
    cross = work.encode([work.split.train[i] for i in range(4)])
    trace = reason(work.network, cross, work.vocabulary.start_tokens[2], 2, labeller.choose)
    assert torch.stack(trace.tokens).unique().tolist() == [work.vocabulary.reasoning_range[0]]
    # learnt as well: a search writes its likeliest token
    assert torch.stack(labeller.labels).unique().tolist() == [work.vocabulary.reasoning_range[0]]
    assert labeller.residuals == []


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_the_papers_literal_recipe_runs(stage):
    config = small_config("model.reasoning_codes=0", "pretrain.batch_size=12", "sft.batch_size=12", "rl.batch_size=6",
                          "rl.group=4", file=LITERAL)  # fmt: skip
    work = small_workspace(config)
    made: dict = {"pretrain": PretrainStep, "sft": SftStep, "rl": RlStep}
    term = {"pretrain": "nll_similar", "sft": "nll_answer", "rl": "policy"}[stage]
    values = overfit(made[stage](work, getattr(config, stage)), work.network, term, updates=20)
    assert all(map(math.isfinite, values)) if stage == "rl" else fell(values, 0.9)
    assert work.vocabulary.reasoning_range == work.vocabulary.item_range
    assert {"score", "ndcg@10/l0", "ndcg@10/l2"} <= validate(work).keys()


def test_the_literal_recipe_differs_from_the_default_where_the_paper_does():
    literal, repaired = small_config("model.reasoning_codes=0", file=LITERAL), small_config()
    assert (literal.model.step_form, literal.sft.inputs, literal.sft.state_loss) == ("token", "label", "contrastive")
    assert literal.rl.anchor_weight == literal.pretrain.plain_weight == 0
    assert (repaired.model.step_form, repaired.sft.inputs, repaired.sft.state_loss) == ("both", "own", "full_softmax")


def test_stage_3_makes_the_mean_reward_rise():
    config = small_config("model.step_form=token", "rl.batch_size=16", "rl.group=12", "rl.anchor_weight=0",
                          "rl.policy_weight=1", "rl.inside_trie=false")  # fmt: skip
    gains = []
    for seed in (0, 1):
        work = small_workspace(config, seed)
        values = overfit(RlStep(work, config.rl), work.network, "reward", updates=60)
        gains.append(np.mean(values[-5:]) - np.mean(values[:5]))
    assert np.mean(gains) > 0.25  # measured: 0.6; most of it because nothing it writes is an item at first


@pytest.mark.parametrize("form", ["token", "state", "both"])
def test_stage_3_anchored_keeps_the_likelihood_of_the_target(form):
    config = small_config(f"model.step_form={form}", "rl.batch_size=12", "rl.group=4")
    work = small_workspace(config)
    assert fell(overfit(RlStep(work, config.rl), work.network, "anchor", updates=25))


def test_stage_3_starts_on_its_reference_and_ignores_groups_of_equal_rewards():
    config = small_config("rl.anchor_weight=0", "rl.policy_weight=1", "rl.batch_size=6", "rl.group=4",
                          *NO_REWARD)  # fmt: skip
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    loss, terms = step(0)
    assert terms["kl"] == pytest.approx(0, abs=1e-5)
    loss.backward()
    # no reward tells the outputs apart and the policy is where it started: nothing to learn
    assert max(float(p.grad.abs().max()) for p in work.network.parameters() if p.grad is not None) < 1e-5


def test_ratios_know_no_dropout_and_the_anchor_does():
    config = small_config("model.dropout=0.3", "rl.batch_size=6", "rl.group=4")
    work = small_workspace(config)
    work.network.train()
    anchors = []
    for seed in range(2):
        step = RlStep(work, config.rl)
        torch.manual_seed(seed)
        _, terms = step(0)
        assert work.network.training  # as it was
        experience = step.experience[0]
        with mode(work.network, training=False):
            cross = work.encode(experience.histories)
            now = policy_log_probs(work, work.network, cross, experience.rollout, config.rl)
        assert torch.equal(now.detach(), experience.rollout.log_probs)  # a ratio of exactly 1
        assert float(terms["policy"]) == pytest.approx(-float(experience.advantage.mean()), abs=1e-5)
        assert float(terms["kl"]) == pytest.approx(0, abs=1e-6)
        for masks in range(2):
            torch.manual_seed(masks)
            with mode(work.network, training=True):
                anchors.append(float(step.anchor(experience).detach()))
    assert anchors[0] != pytest.approx(anchors[1], rel=1e-3)


def test_every_reward_counts_by_its_weight_whatever_its_spread():
    config = small_config("rl.batch_size=6", "rl.group=8", "rl.match_reward=2", "rl.rank_reward=0")
    step = RlStep(small_workspace(config), config.rl)
    step(0)
    rewards, weights = step.experience[0].rollout.rewards, dict.fromkeys(REWARDS, 1.0) | {"match": 2.0, "rank": 0.0}
    expected = torch.stack([weights[name] * advantages(rewards[name]) for name in REWARDS]).sum(0)
    torch.testing.assert_close(step.experience[0].advantage, expected)


def test_the_policys_gradient_is_kept_at_its_share_of_the_anchors():
    config = small_config("rl.batch_size=12", "rl.group=8", "rl.policy_share=0.5")
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    _, terms = step(0)
    share = float(terms["gradient/policy"]) / float(terms["gradient/anchor"])
    assert share == pytest.approx(0.5, rel=1e-4)

    def norm(policy: bool) -> float:
        """Of one part's gradient, computed by itself."""
        work.network.zero_grad()
        settings = {"policy_weight": 1.0, "anchor_weight": 0.0} if policy else {"policy_weight": 0.0}
        other = RlStep(work, config.rl.model_copy(update={**settings, "policy_share": 0.0}))
        other.experience = step.experience
        loss, _ = other(1)
        loss.backward()
        return float(torch.cat([p.grad.flatten() for p in work.network.parameters() if p.grad is not None]).norm())

    assert float(terms["policy_weight"]) * norm(policy=True) == pytest.approx(0.5 * norm(policy=False), rel=1e-3)


def test_the_policys_weight_moves_half_the_way_and_stays_where_there_is_no_gradient():
    balance = Balance(0.1)
    norm = torch.tensor
    balance.follow(norm(0.25), norm(8.0), share=0.5, at_once=True)
    assert float(balance.weight) == pytest.approx(16)
    balance.follow(norm(1.0), norm(8.0), share=0.5, at_once=False)  # wanted: 4
    assert float(balance.weight) == pytest.approx(8)
    balance.follow(norm(0.0), norm(8.0), share=0.5, at_once=False)
    assert float(balance.weight) == pytest.approx(8) and float(balance.policy) == 0


def test_stage_3_takes_an_epoch_unless_it_is_told_how_many_steps():
    rl = small_config("rl.batch_size=64", "rl.updates=2").rl
    assert rl.steps is None and rl.resolved(1000).steps == 2 * 16
    assert small_config("rl.steps=7").rl.resolved(1000).steps == 7


def test_updates_share_rollouts_and_the_clip_limits_later_updates():
    config = small_config("rl.anchor_weight=0", "rl.policy_weight=1", "rl.kl_weight=0", "rl.batch_size=12",
                          "rl.group=8", "rl.updates=2", "rl.checkpoint_every=2")  # fmt: skip
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    loss, _ = step(0)
    rollouts = step.experience[0]
    loss.backward()
    with torch.no_grad():  # one huge update along the gradient: every ratio that may gain is now beyond the clip
        for parameter in work.network.parameters():
            if parameter.grad is not None:
                parameter.sub_(3 * parameter.grad / parameter.grad.norm().clamp(min=1e-9))
    again, _ = step(1)
    assert step.experience[0] is rollouts
    # min(rho A, clip(rho) A): the gain of a token cannot exceed 1.2 of its advantage
    gain = torch.where(rollouts.advantage > 0, 1.2 * rollouts.advantage, 0.8 * rollouts.advantage).mean()
    assert -float(again.detach()) <= float(gain) + 1e-5
    step(2)
    assert step.experience[0] is not rollouts


def test_the_kl_term_pulls_back_to_the_reference():
    config = small_config("rl.anchor_weight=0", "rl.policy_weight=1", "rl.kl_weight=1", "rl.batch_size=12",
                          "rl.group=8", *NO_REWARD)  # fmt: skip
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in work.network.t5.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    values = overfit(step, work.network, "policy", updates=40, lr=3e-3)
    assert fell(values)


def test_a_start_token_announces_the_steps():
    work = small_workspace(small_config())
    cross = work.encode([work.split.train[0]])
    item = work.item_tokens[:1].unsqueeze(1)
    none, two = (
        teacher_force_directly(work.network, cross, work.vocabulary.start_tokens[steps], item)[0] for steps in (0, 2)
    )
    assert not torch.allclose(none, two)


STEPS = {
    "pretrain": (PretrainStep, []),
    "sft": (SftStep, ["sft.preference_weight=0.1", "sft.preference_after=0", "sft.distillation_weight=0.1"]),
    "sft, in-batch contrast": (SftStep, ["sft.state_loss=contrastive", "sft.labels=random"]),
    "rl": (RlStep, []),
}


@pytest.mark.parametrize("case", STEPS)
def test_no_step_reads_a_value_from_the_device_or_mixes_devices(case):
    kind, settings = STEPS[case]  # on the meta device there are no values: whoever asks for one fails
    config = small_config(*settings)
    loss, terms = kind(small_workspace(config).on("meta"), getattr(config, case.split(",")[0]))(0)
    loss.backward()
    assert {value.device.type for value in (loss, *terms.values())} == {"meta"}
