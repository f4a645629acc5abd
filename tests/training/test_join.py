"""Fitting the gate: the ranks it is fitted by are the search's, each way wins where it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from serving.search.ranker import Ranker
from serving.types import GATE_FEATURES, Gate
from tests.builders import GATE, random_neighbours
from tests.training.small import small_config, small_workspace
from training import join
from training.data.prepare import sample_users
from training.export import choose
from training.join import (
    CONSTANT,
    GATED,
    MEMORY,
    MEMORY_ALONE,
    NETWORK,
    CrossFittedRanker,
    Join,
    Proposals,
    fit_gate,
    fit_join,
    judged,
)
from training.linear import LinearSetting
from training.memory import FittedMemory
from training.memory_choice import MemorySetting
from training.metrics import ndcg, target_ranks
from training.neighbours import JoinedSetting

USERS, ITEMS = 300, 20
SETTING = MemorySetting(JoinedSetting(), LinearSetting(), 0.0, 0.5)
BEAM = 12


@pytest.fixture
def memory() -> FittedMemory:
    """Two graphs at random, one for the even users and one for the odd ones."""
    folds = tuple((np.arange(first, 40, 2), random_neighbours(30, first, mixed=True)) for first in range(2))
    return FittedMemory(random_neighbours(30, 2, mixed=True), folds, {}, SETTING)


@pytest.fixture
def ranker() -> Ranker:
    return small_workspace(small_config()).ranker()


@pytest.fixture
def users() -> tuple[list[np.ndarray], np.ndarray]:
    split = small_workspace(small_config()).split
    return sample_users(split.valid_history, split.valid_target, 40)


@pytest.mark.parametrize("gate", [None, GATE, MEMORY_ALONE, Gate(0.5)])
def test_a_gate_is_fitted_by_the_ranks_of_the_search_that_serves(memory, ranker, users, gate):
    histories, target = users
    settings = replace(ranker.settings, neighbours_weight=1.0, dense_candidates=7)
    asked = replace(ranker, settings=settings)
    proposals = join._proposals(asked, memory, histories, target, BEAM, False, None)
    folds = tuple((part, graph, gate or MEMORY_ALONE) for part, graph in memory.folds)
    if gate is None:
        settings = replace(settings, neighbours_weight=0.0)
    served = CrossFittedRanker(replace(ranker, settings=settings), Join(settings, folds, {}))
    expected = ndcg(target_ranks(served.rank(histories, 0, BEAM), target))
    found = proposals.ndcg(gate)
    if gate is None:  # only the beam's items are served: whatever the memory proposes as well ranks behind them here
        expected, found = (np.where(expected > 0, value, 0) for value in (expected, found))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.mean() > 0


def test_every_user_is_ranked_with_the_memory_and_the_gate_of_the_users_fold(memory, ranker, users):
    histories, _ = users
    settings = replace(ranker.settings, neighbours_weight=1.0, dense_candidates=7)
    (even, first), (odd, second) = memory.folds
    gates = (GATE, MEMORY_ALONE)
    made = Join(settings, ((even, first, gates[0]), (odd, second, gates[1])), {})
    ranked = CrossFittedRanker(replace(ranker, settings=settings), made).rank(histories, 0, BEAM)
    for user in (0, 1, 6, 7):
        own = replace(ranker, neighbours=(first, second)[user % 2], settings=replace(settings, gate=gates[user % 2]))
        np.testing.assert_array_equal(ranked[user], own.rank([histories[user]], 0, BEAM)[0])


def proposals(network_knows: np.ndarray, memory_knows: np.ndarray, peak: np.ndarray, noise: float = 1.0) -> Proposals:
    """Users to whom both propose all items; who knows the target gives it a probability that stands out."""
    rng = np.random.default_rng(0)
    network, share = rng.normal(0, noise, (2, USERS, ITEMS))
    hit = np.zeros((USERS, ITEMS), bool)
    hit[np.arange(USERS), rng.integers(0, ITEMS, USERS)] = True
    network[hit] += 4 * network_knows
    share[hit] += 4 * memory_knows
    features = np.zeros((USERS, len(GATE_FEATURES)))
    features[:, GATE_FEATURES.index("peak")] = peak
    features[:, GATE_FEATURES.index("confidence")] = rng.normal(size=USERS)
    log_p = [values - np.logaddexp.reduce(values, 1, keepdims=True) for values in (network, share)]
    return Proposals(log_p[0], log_p[1], hit, features, np.ones(USERS, bool))


ALL, NOBODY, HALF = np.ones(USERS), np.zeros(USERS), np.arange(USERS) % 2
PARTS = [np.arange(first, USERS, 5) for first in range(5)]


def quality(of: Proposals) -> dict[str, float]:
    return {way: float(judged(of, way, PARTS).mean()) for way in join.WAYS}


def test_the_network_alone_wins_where_the_memory_knows_nothing():
    found = quality(proposals(ALL, NOBODY, NOBODY))
    assert max(found, key=found.__getitem__) == NETWORK and found[NETWORK] > found[MEMORY] + 0.2


def test_the_memory_alone_wins_where_the_network_knows_nothing():
    found = quality(proposals(NOBODY, ALL, NOBODY))
    assert found[MEMORY] >= found[CONSTANT] - 1e-9 and found[MEMORY] > found[NETWORK] + 0.2


def test_a_gate_by_features_wins_where_a_feature_tells_who_knows():
    of = proposals(1 - HALF, HALF, peak=HALF + 0.0, noise=1.5)
    found = quality(of)
    assert max(found, key=found.__getitem__) == GATED and found[GATED] > found[CONSTANT] + 0.02
    gate = fit_gate(of, GATED)
    assert gate is not None and gate.peak < 0 and gate.support == gate.length == 0


def test_the_powers_that_the_targets_follow_are_found():
    """Targets drawn from a mixture of P and share, each to a power, among items that are not all proposed or shared."""
    rng, users, g = np.random.default_rng(0), 6000, 0.002
    network, share = rng.dirichlet(np.full(ITEMS, 0.3), users), rng.dirichlet(np.full(ITEMS, 1.0), users)
    network[:, 0] = share[:, 1] = 0
    weights = g * network**0.5 + (1 - g) * share**3
    weights[:, 0] = 0
    drawn = (weights.cumsum(1) / weights.sum(1, keepdims=True) > rng.random((users, 1))).argmax(1)
    hit = np.arange(ITEMS) == drawn[:, None]
    with np.errstate(divide="ignore"):
        of = Proposals(np.log(network), np.log(share), hit, np.zeros((users, len(GATE_FEATURES))), np.ones(users, bool))
    gate = fit_gate(of, CONSTANT)
    assert gate is not None and (gate.network_power, gate.memory_power) == pytest.approx((0.5, 3), rel=0.1)
    assert gate.intercept == pytest.approx(np.log(g / (1 - g)), rel=0.1) and not any(gate.coefficients.values())


def test_a_gate_without_a_target_to_learn_from_leaves_both_as_they_are():
    assert fit_gate(proposals(ALL, ALL, NOBODY).of(np.arange(0)), GATED) == Gate(0.0)


def test_a_target_that_high_powers_make_improbable_is_no_gain(monkeypatch):
    """Of scores below LEAST_LOG, such as a line search may try, the other items once counted as the target."""
    of = proposals(1 - HALF, HALF, HALF + 0.0)
    assert min(of.network.min(), of.log_share.min()) > -12
    expected = [fit_gate(of, way) for way in (CONSTANT, GATED)]
    monkeypatch.setattr(join, "LEAST_LOG", -12.0)
    assert [fit_gate(of, way) for way in (CONSTANT, GATED)] == expected


def test_powers_stay_within_what_can_be_computed(monkeypatch):
    monkeypatch.setattr(join, "MOST_LOG_POWER", 0.5)
    gate = fit_gate(proposals(ALL, ALL, NOBODY, noise=0.1), CONSTANT)
    assert gate is not None and max(gate.network_power, gate.memory_power) == pytest.approx(np.exp(0.5))


def test_scores_that_are_no_numbers_find_nothing():
    of = proposals(ALL, ALL, NOBODY)
    for gate in (Gate(np.nan), Gate(0.0, network_power=np.inf), Gate(0.0, peak=np.nan)):
        assert not of.ndcg(gate).any()
    network = of.network.copy()
    network[0, of.hit[0].argmin()] = np.nan  # of an item that is not the target
    network[1, :] = np.inf
    found = replace(of, network=network).ndcg(None)
    assert not found[:2].any() and (found[2:] == of.ndcg(None)[2:]).all() and found[2:].any()


def test_a_fit_that_ends_in_no_number_leaves_the_next_simpler_way(monkeypatch):
    of, likeliest = proposals(1 - HALF, HALF, HALF + 0.0), join._likeliest
    expected = fit_gate(of, CONSTANT)

    def diverged(proposals: Proposals, features: torch.Tensor) -> tuple[float, list[float], np.ndarray]:
        intercept, powers, slopes = likeliest(proposals, features)
        return intercept, powers, slopes * np.nan

    monkeypatch.setattr(join, "_likeliest", diverged)  # NaN times no slopes is no slopes
    assert fit_gate(of, GATED) == expected
    monkeypatch.undo()
    unknown = replace(of, network=np.full_like(of.network, np.nan))
    assert fit_gate(unknown, GATED) == fit_gate(unknown, CONSTANT) == MEMORY_ALONE


def test_users_are_judged_with_a_gate_that_they_did_not_choose():
    """To half of them the network knows best, to the other half the memory: one half misleads the other."""
    of, halves = proposals(1 - HALF, HALF, NOBODY), [np.flatnonzero(HALF == half) for half in range(2)]
    own = [of.of(half).ndcg(fit_gate(of.of(half), CONSTANT)).mean() for half in halves]
    assert judged(of, CONSTANT, halves).mean() < np.mean(own) - 0.2


def test_users_of_whom_the_memory_knows_nothing_are_the_networks():
    of = proposals(ALL, NOBODY, NOBODY)
    unknown = replace(of, known=np.zeros(USERS, bool), log_share=np.full_like(of.log_share, -np.inf))
    np.testing.assert_array_equal(unknown.ndcg(MEMORY_ALONE), unknown.ndcg(None))


def test_a_memory_that_knows_the_walk_is_joined_and_a_useless_one_is_not(memory, ranker, users):
    histories, target = users
    following = random_neighbours(30, mixed=True)
    successor = (np.arange(30, dtype=np.int32) + 7) % 30
    certain = replace(following, offsets=np.arange(31), items=successor, weights=np.ones(30, np.float32))
    known = FittedMemory(certain, tuple((part, certain) for part, _ in memory.folds), {}, SETTING)
    found = fit_join(ranker, known, histories, target, BEAM, 12, exclude_seen=False)
    assert found.settings.neighbours_weight == 1.0 and found.settings.gate is not None
    assert found.report["way"] != NETWORK and found.settings.dense_candidates == 12
    own = replace(ranker, settings=found.settings, neighbours=certain)
    assert ndcg(target_ranks(own.rank(histories, 0, BEAM), target)).mean() > 0.5
    wrong = replace(certain, items=(successor + 1) % 30)
    useless = FittedMemory(wrong, tuple((part, wrong) for part, _ in memory.folds), {}, SETTING)
    found = fit_join(ranker, useless, histories, target, BEAM, 12, exclude_seen=False)
    assert found.report["way"] == NETWORK and found.settings.neighbours_weight == 0.0
    assert found.settings.gate is not None  # a request may ask for the memory


def test_a_target_that_was_seen_is_no_hit_where_the_seen_are_excluded(memory, ranker, users):
    """No user whose target lies in the history can be served it, so none of them decides about the gate."""
    histories, _ = users
    repeated = np.array([history[-1] for history in histories])
    for exclude_seen in (False, True):
        found = join._proposals(replace(ranker, settings=replace(ranker.settings, neighbours_weight=1.0,
            dense_candidates=12)), memory, histories, repeated, BEAM, exclude_seen, None)  # fmt: skip
        assert found.hit.any() != exclude_seen
        assert not exclude_seen or not found.ndcg(MEMORY_ALONE).any()


def test_the_final_choice_is_measured_with_what_others_chose(memory, users, monkeypatch):
    """One row per dense weight and number of steps, with the memory's own candidates."""
    work = small_workspace(small_config("neighbours.enabled=true", "evaluation.dense_candidates=[0,3]"))
    seen = []
    rank = CrossFittedRanker.rank
    monkeypatch.setattr(CrossFittedRanker, "rank", lambda *given, **more: seen.append(1) or rank(*given, **more))
    monkeypatch.setattr(join, "WAYS", (MEMORY,))
    choice = choose(work, memory)
    assert choice.join is not None and choice.settings.gate == MEMORY_ALONE
    assert len(seen) == len(choice.table) == 3 * 2
    assert {row["dense_candidates"] for row in choice.table} == {work.config.neighbours.candidates}
    assert choose(work).join is None and len(choose(work).table) == 3 * 3  # without: a weight of 1 with 0 and 3
