"""Training reasons exactly like serving: the same tokens, states and scores as the search and as brute force."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from serving.bundle import Bundle
from serving.items.histories import history_tokens
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.network.t5 import CrossKeysValues
from serving.reference import Reference
from serving.search import beam
from tests.builders import tiny_model
from training.stages.predictions import predict_items, predict_reasoning
from training.stages.reasoning import ReasoningTrace, greedy, reason, residual_label, sinkhorn, teacher_force
from training.workspace import Workspace

FORMS = ("token", "state", "both")
HISTORIES = [(1, 2, 3), (4,), (9, 8, 7, 6, 5, 4, 3, 2)]


def read(bundle: Bundle) -> CrossKeysValues:
    settings = bundle.settings
    tokens, mask = history_tokens(HISTORIES, bundle.catalogue.tokens, settings.max_items, settings.suffix_tokens)
    per_item = bundle.vocabulary.tokens_per_item
    hidden = bundle.network.encode(tokens, mask, settings.attention, per_item)
    return bundle.network.cross_keys_values(hidden, mask, per_item)


def follow(bundle: Bundle, cross: CrossKeysValues, tokens: torch.Tensor) -> ReasoningTrace:
    """Thinks along given tokens (B, Q, l)."""
    start = bundle.vocabulary.start_tokens[tokens.shape[-1]]
    return reason(bundle.network, cross, start, tokens.shape[-1], lambda i, *_: tokens[..., i - 1], tokens.shape[1])


def all_items(bundle: Bundle, paths: int) -> torch.Tensor:
    """Shape: (B, paths, M), the first items of the catalogue."""
    items = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    return items[:paths].expand(len(HISTORIES), -1, -1)


def workspace(bundle: Bundle) -> Workspace:
    """As much of one as predictions need."""
    return cast(Workspace, SimpleNamespace(**{n: getattr(bundle, n) for n in ("network", "vocabulary", "settings")}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("normalise", ["block", "vocabulary"])
@torch.no_grad()
def test_training_scores_an_item_like_brute_force(form, steps, normalise):
    bundle = tiny_model(12, seed=steps, step_form=form, suffix_tokens=(1,), temperature=0.8, normalise=normalise)
    lo, hi = bundle.vocabulary.reasoning_range
    path = torch.randint(lo, hi, (steps,), generator=torch.Generator().manual_seed(1))
    cross = read(bundle)
    trace = follow(bundle, cross, path.expand(len(HISTORIES), 12, -1))
    items = all_items(bundle, 12)
    hidden, _ = teacher_force(bundle.network, cross, trace, items)
    scores = predict_items(workspace(bundle), hidden).of(items).sum(-1)
    reasoning = torch.zeros_like(scores)
    if steps and form != "state":
        reasoning = predict_reasoning(workspace(bundle), trace.hidden).of(torch.stack(trace.tokens, -1)).sum(-1)
    for row, history in enumerate(HISTORIES):
        reference = Reference(bundle, history, steps)
        taken = reference.path((0,) * steps if form == "state" else tuple(path.tolist()))
        expected = [reference.score(taken, item) for item in reference.items]
        np.testing.assert_allclose(scores[row].numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(reasoning[row].numpy(), taken.log_prob, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal-by-item"])
@torch.no_grad()
def test_own_greedy_tokens_and_states_are_those_of_the_search(form, attention):
    bundle = tiny_model(20, seed=4, step_form=form, attention=attention)
    network, settings = bundle.network, bundle.search_settings
    items = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(network, items, attention)
    cross = read(bundle)
    trace = reason(network, cross, settings.start_tokens[3], 3, greedy(network, settings.reasoning_range))
    reasoned = beam.reason(runtime, settings, cross, 3)
    if form != "state":
        assert torch.equal(torch.stack(trace.tokens, -1), reasoned.tokens)
    found = beam.search(runtime, build_trie(bundle.catalogue.tokens), settings, cross, steps=3, beam_width=64)
    best = items[found.items[:, 0]].unsqueeze(1)
    hidden, state = teacher_force(network, cross, trace, best)
    of_best = predict_items(workspace(bundle), hidden).of(best)
    torch.testing.assert_close(torch.stack([*trace.states, state], 2), reasoned.states, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(of_best[:, 0], found.token_log_probs[:, 0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_paths_decoded_together_equal_paths_decoded_one_by_one(form):
    bundle = tiny_model(20, seed=2, step_form=form)
    cross, paths, steps = read(bundle), 5, 3
    lo, hi = bundle.vocabulary.reasoning_range
    tokens = torch.randint(lo, hi, (len(HISTORIES), paths, steps), generator=torch.Generator().manual_seed(3))
    items = all_items(bundle, paths)
    together = follow(bundle, cross, tokens)
    hidden, state = teacher_force(bundle.network, cross, together, items)
    for path in range(paths):
        alone = follow(bundle, cross, tokens[:, path : path + 1])
        one_hidden, one_state = teacher_force(bundle.network, cross, alone, items[:, path : path + 1])
        torch.testing.assert_close(hidden[:, path : path + 1], one_hidden, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(state[:, path : path + 1], one_state, atol=1e-4, rtol=1e-3)
        for mine, its in zip(together.states, alone.states, strict=True):
            torch.testing.assert_close(mine[:, path : path + 1], its, atol=1e-4, rtol=1e-3)


def test_a_later_token_of_an_item_does_not_reach_back():
    bundle = tiny_model(20, seed=2)
    cross = read(bundle)
    lo, _ = bundle.vocabulary.reasoning_range
    trace = follow(bundle, cross, torch.full((len(HISTORIES), 1, 2), lo))
    items = all_items(bundle, 1).clone()
    before, state = teacher_force(bundle.network, cross, trace, items)
    items[..., 1] = items[..., 1] + 1
    after, same_state = teacher_force(bundle.network, cross, trace, items)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(state, same_state, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-2)


def test_the_gradient_of_the_answer_reaches_back_through_every_step():
    bundle = tiny_model(20, seed=2, step_form="state")
    cross = read(bundle)
    trace = follow(bundle, cross, torch.zeros(len(HISTORIES), 1, 3, dtype=torch.int64))
    for state in trace.states:
        state.retain_grad()
    hidden, _ = teacher_force(bundle.network, cross, trace, all_items(bundle, 1))
    hidden[..., 0].square().mean().backward()
    assert all(state.grad is not None and state.grad.abs().max() > 0 for state in trace.states)


def test_the_label_is_the_nearest_code_to_what_is_missing():
    bundle = tiny_model(20, seed=6, reasoning_codes=8)
    network, (lo, hi) = bundle.network, bundle.vocabulary.reasoning_range
    target, state = torch.randn(10, 16), torch.randn(10, 16)
    label, residual = residual_label(network, target, state, (lo, hi), balanced=False)
    torch.testing.assert_close(residual, network.heads.residual(target - state))
    for row in range(10):
        distances = [float((network.t5.shared.weight[code] - residual[row]).detach().norm()) for code in range(lo, hi)]
        assert int(label[row]) == lo + int(np.argmin(distances))
    assert residual.requires_grad and not label.requires_grad


def test_balanced_labels_spread_where_every_nearest_code_is_the_same():
    bundle = tiny_model(20, seed=6, reasoning_codes=8)
    network, (lo, hi) = bundle.network, bundle.vocabulary.reasoning_range
    torch.manual_seed(0)
    with torch.no_grad():
        network.t5.shared.weight[lo + 1 : hi] += 30.0  # all codes but one are far from every residual
    target, state = torch.randn(64, 16), torch.randn(64, 16)
    collapsed, _ = residual_label(network, target, state, (lo, hi), balanced=False)
    spread, _ = residual_label(network, target, state, (lo, hi), balanced=True)
    assert collapsed.unique().tolist() == [lo]
    counts = torch.bincount(spread - lo, minlength=hi - lo)
    assert (counts > 0).sum() >= 6 and counts.max() <= 40  # 8 each if the few rounds were exact


def test_balanced_labels_are_the_nearest_codes_where_those_are_balanced_already():
    """Eight clusters of eight residuals, each around a code: that code, and not the farthest, is the label."""
    bundle = tiny_model(20, seed=6, reasoning_codes=8)
    network, (lo, hi) = bundle.network, bundle.vocabulary.reasoning_range
    torch.manual_seed(0)
    target, state, order = torch.randn(64, 16), torch.randn(64, 16), torch.arange(64) % 8
    with torch.no_grad():
        network.t5.shared.weight[lo:hi] = 10 * torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
        codes = network.t5.shared.weight[lo:hi]

    class Near(torch.nn.Module):
        """Residuals beside the codes, in the order of the rows."""

        def forward(self, missing: torch.Tensor) -> torch.Tensor:
            return codes[order] + 0.1 * missing

    network.heads.residual = Near()
    for balanced in (False, True):
        label, _ = residual_label(network, target, state, (lo, hi), balanced)
        assert (label - lo).tolist() == order.tolist(), balanced


def test_sinkhorn_balances():
    torch.testing.assert_close(sinkhorn(torch.zeros(4, 2)), torch.full((4, 2), 0.5))
    torch.manual_seed(0)
    scores = torch.randn(64, 8)
    scores[:, 0] += 3  # every row likes the first code best
    assert (scores.argmax(1) == 0).float().mean() > 0.8
    plan = sinkhorn(scores)
    torch.testing.assert_close(plan.sum(1), torch.ones(64))
    assert (plan.sum(0) - 8).abs().max() < 3  # 64 rows over 8 codes, in five rounds
    assert torch.bincount(plan.argmax(1), minlength=8).max() < 20


def test_sinkhorn_by_hand():
    scores = torch.tensor([[0.0, 2.0], [2.0, 0.0]])  # mean 1, standard deviation sqrt(4 / 3): 3 ** .5 / 2 to each side
    small = math.exp(-math.sqrt(3))
    start = torch.tensor([[small, 1.0], [1.0, small]])
    torch.testing.assert_close(sinkhorn(scores, sharpness=4.0, rounds=0), start)
    torch.testing.assert_close(sinkhorn(scores, sharpness=4.0), start / (1 + small))
    torch.testing.assert_close(sinkhorn(scores, sharpness=8.0, rounds=0), start**2)
    # (1, 1/3), (1, 1): divided by the columns (1/2, 1/4), (1/2, 3/4), and then by the rows
    uneven = torch.tensor([[0.0, math.log(1 / 3)], [math.log(1 / 3), math.log(1 / 3)]])
    torch.testing.assert_close(
        sinkhorn(uneven, sharpness=4 * float(uneven.std()), rounds=1), torch.tensor([[2 / 3, 1 / 3], [2 / 5, 3 / 5]])
    )


def test_sinkhorn_is_invariant_to_the_scale_of_the_scores():
    torch.manual_seed(0)
    scores = torch.randn(32, 4)
    torch.testing.assert_close(sinkhorn(scores), sinkhorn(1000 * scores + 5), atol=1e-4, rtol=1e-3)
