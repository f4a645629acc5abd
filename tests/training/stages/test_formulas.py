"""Every term of a stage, computed again from its formula: which network, which tokens, which weight, which way round.

Dropout is off and the network is moved away from its reference first, so that what is mixed up shows in a number.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serving.network.model import StreamRec, dense_logits
from tests.training.small import small_config, small_workspace
from training.data.examples import batch_at
from training.stages import losses
from training.stages.answers import rivals
from training.stages.predictions import Predictions, predict_items, predict_reasoning
from training.stages.pretrain import PretrainStep
from training.stages.reasoning import ReasoningTrace, greedy, reason, teacher_force, teacher_force_directly
from training.stages.rl import RlStep
from training.stages.rollouts import Rollout, policy_log_probs
from training.stages.sft import SftStep
from training.workspace import Workspace

STEPS = 2
SMOOTHING = 0.2


def move(network: torch.nn.Module, seed: int) -> None:
    """Changes every weight a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Batch:
    """The histories and targets of a step, decoded by a network without and after reasoning."""

    def __init__(self, work: Workspace, seed: int, step: int, size: int) -> None:
        index = batch_at(work.examples, size, seed, step)
        self.work, self.histories = work, work.examples.histories(index)
        self.items = torch.from_numpy(work.examples.targets(index))
        self.target = work.item_tokens[self.items].unsqueeze(1)

    def direct(self, network: StreamRec) -> tuple[Predictions, torch.Tensor]:
        work = self.work.with_network(network)
        start = work.vocabulary.start_tokens[0]
        hidden, state = teacher_force_directly(network, work.encode(self.histories), start, self.target)
        return predict_items(work, hidden), state

    def log_p_directly(self, network: StreamRec, item: torch.Tensor) -> torch.Tensor:
        """log P of other items (B, 1, M) without reasoning."""
        work = self.work.with_network(network)
        hidden, _ = teacher_force_directly(network, work.encode(self.histories), work.vocabulary.start_tokens[0], item)
        return predict_items(work, hidden).of(item).sum((1, 2))

    def reasoned(
        self, network: StreamRec, tokens: list[torch.Tensor] | None = None
    ) -> tuple[Predictions, ReasoningTrace, torch.Tensor]:
        """With the network's own tokens, or with given ones."""
        work = self.work.with_network(network)
        cross, start = work.encode(self.histories), work.vocabulary.start_tokens[STEPS]
        own = greedy(network, work.vocabulary.reasoning_range)
        trace = reason(network, cross, start, STEPS, own if tokens is None else lambda i, *_: tokens[i - 1])
        hidden, state = teacher_force(network, cross, trace, self.target)
        return predict_items(work, hidden), trace, state


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_stage_1_by_its_formula():
    config = small_config(
        "pretrain.batch_size=12", f"pretrain.label_smoothing={SMOOTHING}", "pretrain.similar_weight=0"
    )
    work = small_workspace(config)
    _, terms = PretrainStep(work, config.pretrain)(3)
    batch = Batch(work, config.seed, 3, 12)
    close(terms["nll"], losses.nll(batch.direct(work.network)[0], batch.target, SMOOTHING))


@pytest.mark.parametrize("state_loss", ["full_softmax", "contrastive"])
@pytest.mark.parametrize("inputs", ["own", "label"])
def test_stage_2_by_its_formulas(state_loss: str, inputs: str):
    config = small_config(
        f"lengths=[{STEPS}]", "sft.batch_size=12", f"sft.label_smoothing={SMOOTHING}", "sft.preference_weight=0.7",
        "sft.preference_after=0", "sft.distillation_weight=0.3",
        "sft.balanced=false", f"sft.state_loss={state_loss}", f"sft.inputs={inputs}",
        "model.temperature=0.8",
    )  # fmt: skip
    work = small_workspace(config)
    step = SftStep(work, config.sft)
    network, reference = work.network, step.reference
    assert reference is not None
    move(network, 1)
    _, terms = step(3)

    batch = Batch(work, config.seed + 1, 3, 12)
    lo, hi = work.vocabulary.reasoning_range
    vectors = network.item_vectors(work.item_tokens)
    labels, residuals = [], []

    def labelled(i: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        residuals.append(network.heads.residual(vectors[batch.items] - state[:, 0]))
        labels.append(lo + torch.cdist(residuals[-1], network.t5.shared.weight[lo:hi]).argmin(-1))
        return labels[-1].unsqueeze(1) if inputs == "label" else greedy(network, (lo, hi))(i, hidden, state)

    cross = work.encode(batch.histories)
    trace = reason(network, cross, work.vocabulary.start_tokens[STEPS], STEPS, labelled)
    hidden, last = teacher_force(network, cross, trace, batch.target)
    reasoned = predict_items(work, hidden)
    direct, first = batch.direct(network)
    close(terms["nll_plain"], losses.nll(direct, batch.target, SMOOTHING))
    close(terms["nll_answer"], losses.nll(reasoned, batch.target, SMOOTHING))
    close(
        terms["nll_reasoning"], losses.nll(predict_reasoning(work, trace.hidden), torch.stack(labels, 1).unsqueeze(1))
    )
    codes = [network.t5.shared(label) for label in labels]
    pairs = zip(residuals, codes, strict=True)
    close(terms["quantization"], torch.stack([losses.quantization(r, c) for r, c in pairs]).mean())
    close(terms["distillation"], losses.distillation(student=direct, teacher=reasoned))

    before_reasoned, before_trace, _ = batch.reasoned(reference, trace.tokens)
    rival = work.item_tokens[rivals(work, cross, batch.items)].unsqueeze(1)
    assert not (rival == batch.target).all(-1).any()

    def of_winner(of: StreamRec, item: Predictions, thoughts: ReasoningTrace) -> torch.Tensor:
        tokens = predict_reasoning(work.with_network(of), thoughts.hidden).of(torch.stack(trace.tokens, -1))
        return item.of(batch.target).sum((1, 2)) + tokens.sum((1, 2))

    winner = of_winner(network, reasoned, trace) - of_winner(reference, before_reasoned, before_trace)
    margin = winner - batch.log_p_directly(network, rival) + batch.log_p_directly(reference, rival)
    assert margin.abs().max() > 0.1  # or a sign would not show
    close(terms["preference"], -F.logsigmoid(config.sft.preference_beta * margin).mean())

    states = [state[:, 0] for state in (first, *trace.states, last)]
    assert len(states) == STEPS + 2  # without reasoning, then s_0 .. s_l
    if state_loss == "contrastive":
        tau = config.sft.contrastive_temperature
        each = [losses.contrastive(s, vectors[batch.items], batch.items, torch.arange(12), tau) for s in states]
    else:
        each = [F.cross_entropy(dense_logits(s, vectors), batch.items) for s in states]
    close(terms["state"], torch.stack(each).mean())


def test_the_preference_teaches_to_prefer_the_reasoned_answer():
    weights = [f"sft.{name}_weight=0" for name in ("plain", "answer", "reasoning", "state", "quantization")]
    config = small_config(*weights, "sft.preference_weight=1", "sft.preference_after=0", f"lengths=[{STEPS}]",
                          "sft.batch_size=24")  # fmt: skip
    work = small_workspace(config)
    step = SftStep(work, config.sft)
    batch = Batch(work, config.seed + 1, 0, 24)
    rival = work.item_tokens[rivals(work, work.encode(batch.histories), batch.items)].unsqueeze(1)

    @torch.no_grad()
    def gain() -> float:
        reasoned = batch.reasoned(work.network)[0].of(batch.target).sum((1, 2))
        return float((reasoned - batch.log_p_directly(work.network, rival)).mean())

    before = gain()
    optimiser = torch.optim.Adam(work.network.parameters(), lr=1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        step(0)[0].backward()
        optimiser.step()
    assert gain() > before + 0.5


def test_labels_teach_nothing_to_the_vectors_they_are_made_from():
    """The target's representation is a constant: else the vectors of the items would move to where it is easy."""
    weights = [f"sft.{name}_weight=0" for name in ("plain", "answer", "reasoning", "state", "preference")]
    config = small_config(*weights, "sft.quantization_weight=1", "model.step_form=token")
    work = small_workspace(config)
    SftStep(work, config.sft)(0)[0].backward()
    assert work.network.heads.item_free.weight.grad is None
    assert work.network.t5.shared.weight.grad is not None


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_reference_has_no_dropout(stage: str):
    config = small_config("model.dropout=0.3", "sft.preference_weight=1")
    work = small_workspace(config)
    work.network.train()
    step = SftStep(work, config.sft) if stage == "sft" else RlStep(work, config.rl)
    assert step.reference is not None and not step.reference.training
    assert not any(parameter.requires_grad for parameter in step.reference.parameters())


def test_policies_are_compared_without_dropout():
    """With masks the ratios of the very first update would differ from 1."""
    config = small_config("model.dropout=0.3", "rl.batch_size=6", "rl.group=4", "rl.updates=2", "rl.checkpoint_every=2")
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    for update in range(2):
        work.network.train()  # as the training loop does before every step
        _, terms = step(update)
        assert float(terms["kl"]) == pytest.approx(0, abs=1e-5)
        assert float(terms["policy"]) == pytest.approx(0, abs=1e-5)  # the mean advantage


def test_stage_3_by_its_formulas():
    config = small_config(
        f"lengths=[{STEPS}]", "rl.batch_size=6", "rl.group=5", "rl.updates=2", "rl.checkpoint_every=2", "rl.clip=0.1",
        "rl.kl_weight=0.7", "rl.policy_weight=0.6", "rl.anchor_weight=0.3", f"rl.label_smoothing={SMOOTHING}",
        "rl.format_reward=0.1", "rl.match_reward=0.2", "rl.similarity_reward=0.3", "rl.likelihood_reward=0.4",
        "rl.rank_reward=0.5", "rl.answer_reward=0.6", "model.temperature=0.8",
    )  # fmt: skip
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    network, reference = work.network, step.reference
    move(network, 1)  # as if earlier batches had moved it
    step(2)
    move(network, 2)
    loss, terms = step(3)

    batch = Batch(work, config.seed + 2, 1, 6)  # two updates share the second batch
    known = step.experience[0]
    assert all(np.array_equal(*pair) for pair in zip(known.histories, batch.histories, strict=True))
    assert torch.equal(known.target_item, batch.items)

    def log_probs(of: StreamRec) -> torch.Tensor:
        at = work.with_network(of)
        return policy_log_probs(at, of, at.encode(batch.histories), known.rollout, config.rl)

    now, before, old = log_probs(network), log_probs(reference), known.rollout.log_probs
    for pair in ((now, before), (now, old), (before, old)):
        assert not torch.allclose(*pair, atol=1e-2)
    close(known.reference, before)
    weights = {"format": 0.1, "match": 0.2, "similarity": 0.3, "likelihood": 0.4, "rank": 0.5, "answer": 0.6}
    reward = torch.stack([weight * known.rollout.rewards[name] for name, weight in weights.items()]).sum(0)
    advantage = torch.stack([w * losses.advantages(known.rollout.rewards[name]) for name, w in weights.items()]).sum(0)
    close(known.advantage, advantage)
    close(terms["reward"], reward.mean())
    close(terms["reward_spread"], reward.std(-1).mean())
    for name in weights:
        close(terms[f"reward/{name}"], known.rollout.rewards[name].mean())
    close(terms["kl"], (now - before).mean())
    close(terms["policy"], losses.grpo(now, old, before, advantage, clip=0.1, beta=0.7))
    direct, reasoned = batch.direct(network)[0], batch.reasoned(network)[0]
    close(terms["anchor"], sum(losses.nll(found, batch.target, SMOOTHING) for found in (direct, reasoned)))
    close(loss, 0.6 * terms["policy"] + 0.3 * terms["anchor"])


@pytest.mark.parametrize("steps", [0, STEPS])
def test_rewards_by_their_formulas(steps: int):
    config = small_config(f"lengths=[{steps}]", "rl.batch_size=6", "rl.group=5", "model.temperature=0.8")
    work = small_workspace(config)
    step = RlStep(work, config.rl)
    step(0)
    batch, network = Batch(work, config.seed + 2, 0, 6), work.network
    rollout: Rollout = step.experience[0].rollout
    assert rollout.steps == steps
    cross, start = work.encode(batch.histories), work.vocabulary.start_tokens[steps]
    vectors = network.item_vectors(work.item_tokens)[batch.items]
    items = {tuple(tokens) for tokens in work.item_tokens.tolist()}
    direct = batch.direct(network)[0].of(batch.target).sum((1, 2))
    for output in range(5):  # one by one, where the stage decodes all of a group together
        tokens, written = rollout.reasoning[:, output : output + 1], rollout.item[:, output : output + 1]
        trace = reason(network, cross, start, steps, lambda i, *_, tokens=tokens: tokens[..., i - 1])
        _, state = teacher_force(network, cross, trace, written)
        given = predict_items(work, teacher_force(network, cross, trace, batch.target)[0])
        found = {name: value[:, output] for name, value in rollout.rewards.items()}
        close(found["format"], torch.tensor([float(tuple(row) in items) - 1 for row in written[:, 0].tolist()]))
        correct = (written[:, 0] == batch.target[:, 0]).long().cumprod(-1)
        close(found["match"], correct.float().mean(-1))
        close(found["similarity"], F.cosine_similarity(state[:, 0], vectors))
        close(found["likelihood"], torch.sigmoid(given.of(batch.target).sum((1, 2)) - direct))
        logits = dense_logits(state[:, 0], vectors)
        better = [
            sum(
                bool(logits[row, other] > logits[row, row]) and batch.items[other] != batch.items[row]
                for other in range(6)
            )
            for row in range(6)
        ]
        close(found["rank"], 1 / (1 + torch.tensor(better)))
