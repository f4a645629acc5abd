"""Every loss against numbers worked out by hand; `test_stages` shows that each falls when it is trained."""

from __future__ import annotations

import math

import pytest
import torch

from serving.network.model import dense_logits
from tests.training.small import small_config, small_workspace
from training.stages import losses
from training.stages.predictions import Predictions, predict_items


def approx(value: float) -> object:
    return pytest.approx(value, abs=1e-5)


def predictions(logits: torch.Tensor, first: int = 0) -> Predictions:
    """Of every position over the same ids, `first` and those that follow. Shape: (B, T, C)."""
    return Predictions([part.log_softmax(-1).unsqueeze(1) for part in logits.unbind(1)], [first] * logits.shape[1])


def test_nll_sums_over_tokens_and_averages_over_sequences():
    log_p = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    logits = log_p.expand(2, 2, 4)
    tokens = torch.tensor([[[0, 1]], [[2, 3]]])
    # -ln(1/2) - ln(1/4) = 3 ln 2;  -ln(1/8) - ln(1/8) = 6 ln 2;  mean 4.5 ln 2
    assert float(losses.nll(predictions(logits), tokens)) == approx(4.5 * math.log(2))
    assert float(losses.nll(predictions(logits, first=7), tokens + 7)) == approx(4.5 * math.log(2))


def test_nll_spreads_a_share_of_the_label():
    log_p = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    # a fifth of the label lies evenly on all four: .8 ln 2 + .05 (1 + 2 + 3 + 3) ln 2
    assert float(losses.nll(predictions(log_p), torch.tensor([[[0]]]), smoothing=0.2)) == approx(1.25 * math.log(2))


def test_contrastive_by_hand():
    state, target = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    # the cosines are 1 on the diagonal and 0 beside it, whatever the lengths: -ln(e / (e + 1)) = ln(1 + 1/e)
    item, index = torch.tensor([4, 5]), torch.arange(2)
    assert float(losses.contrastive(state, target, item, index, 1.0)) == approx(math.log(1 + math.exp(-1)))
    # at temperature 1/2 they are 2 and 0
    assert float(losses.contrastive(state, target, item, index, 0.5)) == approx(math.log(1 + math.exp(-2)))


def test_rows_of_the_same_item_are_no_negatives():
    state = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    item = torch.tensor([7, 7, 8])
    # rows 0 and 1 see only themselves and row 2: ln(1 + e^-1); row 2 sees itself and both twins: ln(1 + 2 e^-1)
    expected = (2 * math.log(1 + math.exp(-1)) + math.log(1 + 2 * math.exp(-1))) / 3
    assert float(losses.contrastive(state, state, item, torch.arange(3), 1.0)) == approx(expected)
    assert float(losses.contrastive(state[:2], state[:2], item[:2], torch.arange(2), 1.0)) == approx(0.0)
    # some rows of the batch, in any order, against all of its targets
    assert float(losses.contrastive(state[2:], state, item, torch.tensor([2]), 1.0)) == approx(
        math.log(1 + 2 * math.exp(-1))
    )
    assert float(losses.contrastive(state[[2, 0]], state, item, torch.tensor([2, 0]), 1.0)) == approx(
        (math.log(1 + math.exp(-1)) + math.log(1 + 2 * math.exp(-1))) / 2
    )


def test_distillation_by_hand():
    teacher = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]).requires_grad_()  # 1/2 and 1/2, twice
    student = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]]).requires_grad_()  # 3/4 and 1/4, then the teacher's own
    loss = losses.distillation(predictions(student), predictions(teacher))
    assert float(loss.detach()) == approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_full_softmax_by_hand():
    # <(2, 0), (1, 5)> / sqrt(2) = sqrt(2);  <(2, 0), (0, 7)> / sqrt(2) = 0
    state, vectors = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 5.0], [0.0, 7.0]])
    torch.testing.assert_close(dense_logits(state, vectors), torch.tensor([[math.sqrt(2), 0.0]]))
    # -ln(1 / (1 + e^sqrt2)) for the second item
    found = losses.full_softmax(state, vectors, torch.tensor([1]))
    assert float(found) == approx(math.log(1 + math.exp(math.sqrt(2))))


@pytest.mark.parametrize("at_once", [30, 60, 1], ids=["3 rows", "6 rows", "1 row"])
def test_full_softmax_in_parts_is_that_of_the_whole_with_its_gradients(monkeypatch, at_once):
    rng = torch.Generator().manual_seed(0)
    state, vectors = torch.randn(7, 4, generator=rng), torch.randn(10, 4, generator=rng)
    item = torch.tensor([0, 9, 3, 3, 5, 1, 2])

    def found() -> tuple[torch.Tensor, ...]:
        own = state.clone().requires_grad_(), vectors.clone().requires_grad_()
        loss = losses.full_softmax(*own, item, smoothing=0.1)
        return loss.detach(), *torch.autograd.grad(loss, own)

    whole = found()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    for part, expected in zip(found(), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_quantization_pulls_code_and_residual_with_their_own_weights():
    residual = torch.tensor([[1.0, 2.0]], requires_grad=True)
    code = torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss = losses.quantization(residual, code)
    # |r - c|^2 = 5, so 5 + 0.25 * 5
    assert float(loss.detach()) == approx(6.25)
    loss.backward()
    # d/dc = 2 (c - r) and d/dr = 0.25 * 2 (r - c), each through its own term only
    torch.testing.assert_close(code.grad, torch.tensor([[-2.0, -4.0]]))
    torch.testing.assert_close(residual.grad, torch.tensor([[0.5, 1.0]]))


def test_quantization_is_a_mean_over_the_batch():
    residual, code = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2, 2)
    assert float(losses.quantization(residual, code, commitment=0.0)) == approx((1 + 9) / 2)


def test_preference_by_hand():
    now, before = (torch.tensor([-1.0]), torch.tensor([-3.0])), (torch.tensor([-2.0]), torch.tensor([-2.0]))
    # margin = (-1 + 2) - (-3 + 2) = 2; beta 0.5: -ln sigmoid(1) = ln(1 + 1/e)
    assert float(losses.preference(*now, *before, 0.5)) == approx(math.log(1 + math.exp(-1)))
    # nothing has changed since the reference: -ln sigmoid(0) = ln 2
    assert float(losses.preference(*now, *now, 0.5)) == approx(math.log(2))
    # four different numbers: margin (-1 + 4) - (-3 + 3.5) = 2.5
    reasoned, direct, old_reasoned, old_direct = (torch.tensor([value]) for value in (-1.0, -3.0, -4.0, -3.5))
    found = losses.preference(reasoned, direct, old_reasoned, old_direct, 0.4)
    assert float(found) == approx(math.log(1 + math.exp(-1)))
    # the direct answer gained: margin -2
    assert float(losses.preference(*now[::-1], *before, 0.5)) == approx(math.log(1 + math.exp(1)))


def test_log_probs_of_given_tokens_by_hand():
    """Each position has ids and a number of ids of its own."""
    first = torch.tensor([[[0.0, math.log(3)]], [[math.log(4), 0.0]]]).log_softmax(-1)
    second = torch.tensor([[[1.0, 1.0, 1.0]], [[0.0, math.log(2), 0.0]]]).log_softmax(-1)
    found = Predictions([first, second], [10, 12]).of(torch.tensor([[[11, 14]], [[11, 13]]]))
    expected = [[[math.log(3 / 4), math.log(1 / 3)]], [[math.log(1 / 5), math.log(1 / 2)]]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("normalise", "probability"), [("block", 3 / 4), ("vocabulary", 3 / 12)])
def test_a_prediction_is_normalised_over_the_block_or_over_everything(normalise, probability):
    work = small_workspace(small_config(f"model.normalise={normalise}", "model.temperature=2"))
    (lo, hi), size = work.vocabulary.level_ranges[1], work.vocabulary.size
    direction = torch.nn.functional.one_hot(torch.tensor(0), 16).float()
    scale = 2 * 16**0.5  # undoes the temperature and the scaling of the logits
    with torch.no_grad():
        work.network.t5.shared.weight.fill_(-1e4)
        work.network.t5.shared.weight[lo : lo + 2] = scale * torch.tensor([[3.0], [1.0]]).log() * direction
        work.network.t5.shared.weight[size - 1] = scale * math.log(8) * direction  # a reasoning code
    hidden = direction.expand(1, 1, 3, 16)
    found = predict_items(work, hidden).of(torch.tensor([[[lo - 1, lo, hi]]]))
    assert float(found[0, 0, 1].detach()) == approx(math.log(probability))


def test_smoothing_spreads_over_the_block_only():
    work = small_workspace(small_config())
    tokens = work.item_tokens[:4].unsqueeze(1)
    hidden = torch.randn(4, 1, 3, 16)
    losses.nll(predict_items(work, hidden), tokens, 0.3).backward()
    touched = work.network.t5.shared.weight.grad.abs().sum(1) > 0
    first, end = work.vocabulary.item_range
    assert touched[first:end].all() and not touched[:first].any() and not touched[end:].any()


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # ratios 1.5 and 0.5. A = 1: min(1.5, 1.2) = 1.2 and min(0.5, 0.8) = 0.5, mean 0.85
        (1.0, -0.85),
        # A = -1: min(-1.5, -1.2) = -1.5 and min(-0.5, -0.8) = -0.8, mean -1.15
        (-1.0, 1.15),
        (0.0, 0.0),
    ],
)
def test_grpo_clips_only_what_would_gain(advantage, expected):
    now = torch.tensor([[[1.5, 0.5]]]).log().requires_grad_()
    loss = losses.grpo(now, torch.zeros(1, 1, 2), now.detach(), torch.tensor([[advantage]]), clip=0.2, beta=1.0)
    assert float(loss.detach()) == approx(expected)
    loss.backward()
    # d(ratio A)/d(log p) = ratio A, over two tokens, and 0 where the clipped side is the smaller
    wanted = {1.0: [0.0, -0.25], -1.0: [0.75, 0.0], 0.0: [0.0, 0.0]}[advantage]
    torch.testing.assert_close(now.grad, torch.tensor([[wanted]]))


def test_grpo_kl_by_hand():
    now, reference = torch.zeros(1, 1, 2), torch.tensor([[[math.log(2), math.log(4)]]])
    # k3 of a gap g: e^g - g - 1 = 1 - ln 2 and 3 - ln 4; the other way round it would be ln 2 - 1/2 and ln 4 - 3/4
    loss = losses.grpo(now, now, reference, torch.zeros(1, 1), clip=0.2, beta=0.4)
    assert float(loss) == approx(0.4 * (4 - 3 * math.log(2)) / 2)
    # a token that became unlikely is pulled up, and harder than one that became likely is pulled down
    moved = torch.tensor([[[-math.log(4), math.log(4)]]], requires_grad=True)
    losses.grpo(moved, moved.detach(), now, torch.zeros(1, 1), clip=0.2, beta=1.0).backward()
    torch.testing.assert_close(moved.grad, torch.tensor([[[(1 - 4) / 2, (1 - 1 / 4) / 2]]]))
    assert float(losses.grpo(now, now, now, torch.zeros(1, 1), clip=0.2, beta=0.4)) == 0.0


def test_advantages_by_hand():
    # mean 2, variance (1 + 0 + 1) / 3
    found = losses.advantages(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([[-math.sqrt(1.5), 0.0, math.sqrt(1.5)]]), atol=1e-3, rtol=0)


def test_a_group_of_equal_rewards_teaches_nothing():
    equal = torch.full((2, 5), 0.3)
    assert losses.advantages(equal).abs().max() < 1e-3
    found = losses.advantages(torch.tensor([[2.0, 2.0], [0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), atol=1e-3, rtol=0)
