"""The search against brute force: same items, same order, same scores, alone and in any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine import Engine
from serving.reference import score_all_items
from serving.search import reason
from serving.types import Request, Rules
from tests.builders import tiny_model

TOLERANCE = 1e-4


def ask(engine: Engine, *requests: Request) -> list:
    return engine.search(list(requests), engine.encode([request.history for request in requests]))


def reasoning_of(engine: Engine, history: tuple[int, ...], steps: int) -> tuple[int, ...] | int:
    """The single reasoning path that the search takes, found by the search's first half alone."""
    if engine.bundle.settings.step_form == "state":
        return steps
    state = torch.from_numpy(engine.encode([history])[0].hidden)[None]
    memory = engine.runtime.memory(state, torch.ones(state.shape[:2], dtype=torch.bool))
    return tuple(reason(engine.runtime, engine.bundle.search_settings, memory, steps).tokens[0, 0].tolist())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 60),
    steps=st.integers(0, 3),
    form=st.sampled_from(["token", "state", "both"]),
    batch=st.integers(1, 4),
    attention=st.sampled_from(["bidirectional", "causal-by-item"]),
    dense=st.sampled_from([0.0, 0.7]),
)
@torch.no_grad()
def test_a_wide_beam_returns_every_item_as_brute_force_scores_it(seed, items, steps, form, batch, attention, dense):
    bundle = tiny_model(items, seed=seed, step_form=form, attention=attention, dense_weight=dense, suffix_tokens=(1,))
    engine = Engine(bundle)
    rng = np.random.default_rng(seed)
    histories = [tuple(rng.integers(0, items, rng.integers(0, 9)).tolist()) for _ in range(batch)]
    answers = ask(engine, *(Request(history, items, 64, steps) for history in histories))
    for history, answer in zip(histories, answers, strict=True):
        expected, _ = score_all_items(bundle, history, reasoning_of(engine, history, steps), dense)
        order = np.argsort(-expected, kind="stable")
        assert sorted(answer.items) == list(range(items))
        np.testing.assert_allclose(answer.scores, expected[answer.items], atol=TOLERANCE)
        np.testing.assert_allclose(answer.scores, expected[order], atol=TOLERANCE)


def test_the_single_path_is_the_greedy_one_and_leaves_no_trace_in_the_scores():
    bundle = tiny_model(seed=3, step_form="token")
    engine = Engine(bundle)
    history = (1, 2, 3)
    (answer,) = ask(engine, Request(history, 5, 64, 1, explain=True))
    lo, hi = bundle.vocabulary.reasoning_range
    every = [score_all_items(bundle, history, (token,)) for token in range(lo, hi)]
    greedy = int(np.argmax([log_prob for _, log_prob in every]))
    assert answer.trace is not None and answer.trace.reasoning_tokens == [lo + greedy]
    np.testing.assert_allclose(answer.scores, np.sort(every[greedy][0])[::-1][:5], atol=TOLERANCE)
    np.testing.assert_allclose(answer.trace.reasoning_log_probs, [every[greedy][1]], atol=TOLERANCE)
    np.testing.assert_allclose(np.sum(answer.trace.token_log_probs, axis=1), answer.scores, atol=TOLERANCE)


@pytest.mark.parametrize("merge", ["logsumexp", "max"])
def test_paths_that_end_in_one_item_are_merged(merge):
    bundle = tiny_model(seed=5, step_form="token", reasoning_codes=3, paths=9, merge=merge)
    engine = Engine(bundle)
    history = (4, 8)
    (answer,) = ask(engine, Request(history, 60, 64, 2))
    lo, hi = bundle.vocabulary.reasoning_range
    every = [score_all_items(bundle, history, pair) for pair in itertools.product(range(lo, hi), repeat=2)]
    log_probs = np.array([log_prob for _, log_prob in every])
    shares = log_probs - np.logaddexp.reduce(log_probs)
    totals = np.stack([scores for scores, _ in every]) + shares[:, None]
    expected = np.logaddexp.reduce(totals) if merge == "logsumexp" else totals.max(0)
    assert len(set(answer.items)) == 60
    np.testing.assert_allclose(answer.scores, np.sort(expected)[::-1], atol=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), steps=st.integers(0, 2), paths=st.integers(1, 3))
def test_k_never_shrinks_under_rules(seed, k, steps, paths):
    bundle = tiny_model(40, seed=seed, paths=paths)
    rng = np.random.default_rng(seed)
    some = lambda n: tuple(rng.choice(40, n, replace=False).tolist())  # noqa: E731
    rules = Rules(
        exclude=some(int(rng.integers(0, 30))),
        deny=some(3),
        allow=some(20) if rng.random() < 0.5 else None,
        categories=("even",) if rng.random() < 0.3 else (),
        catalogue="small" if rng.random() < 0.2 else None,
    )
    (answer,) = ask(Engine(bundle), Request((1, 2), k, 12, steps, rules))
    permitted = set(np.flatnonzero(bundle.catalogue.permitted(rules)).tolist())
    assert len(set(answer.items)) == len(answer.items) == min(k, len(permitted))
    assert set(answer.items) <= permitted
    assert answer.scores == sorted(answer.scores, reverse=True)


def test_an_answer_does_not_depend_on_its_batch_mates():
    engine = Engine(tiny_model(seed=9))
    requests = [Request(tuple(range(i, i + 1 + i % 5)), 10, 20, 3, Rules(exclude=(i,))) for i in range(9)]
    together = ask(engine, *requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = ask(engine, request)
        assert alone.items == answer.items
        np.testing.assert_allclose(alone.scores, answer.scores, atol=1e-5)
