"""The simulation: right where theory knows the answer, and true to the costs it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from benchmarks.service.capacity import fit, from_json, predict, simulated, to_json
from benchmarks.service.redis_memory import users_seen
from benchmarks.service.simulation import ServiceTimes, Setting, simulate
from benchmarks.service.traffic import zipf

FLAT = [(0.0, 1.0), (1.0, 1.0)]


def costs(seconds: float, noise: Sequence[tuple[float, float]] = FLAT, overhead: float = 0.0) -> ServiceTimes:
    """Every search takes so long, whatever its steps and rows."""
    return ServiceTimes({0: (seconds, 0.0)}, (0.0, 0.0), noise, [(0.0, overhead), (1.0, overhead)])


def exponential(seed: int) -> list[tuple[float, float]]:
    """Draws so close in time that two batches never meet neighbours."""
    draws = np.random.default_rng(seed).exponential(size=20_000)
    return [(1e-5 * place, float(value)) for place, value in enumerate(draws)]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_at_a_time_is_the_queue_of_the_textbook(load: float) -> None:
    """Poisson arrivals, exponential service, one server: the mean stay is service / (1 - load)."""
    service = 0.01
    setting = Setting(rate=load / service, seconds=120, max_batch=1, max_wait=1e9)
    found = [simulate(costs(service, exponential(seed)), replace(setting, seed=seed)) for seed in (1, 2)]
    stays = [seconds for outcome in found for seconds in outcome.seconds]
    assert np.mean(stays) == pytest.approx(service / (1 - load), rel=0.12)
    assert np.mean([outcome.busy for outcome in found]) == pytest.approx(load, rel=0.05)
    assert sum(outcome.rejected for outcome in found) < 0.01 * len(stays), "only budgets of 250 ms may be refused"


def test_batches_carry_what_single_searches_cannot() -> None:
    base = Setting(rate=250, seconds=30)
    single = simulate(costs(0.01), replace(base, max_batch=1))
    batched = simulate(costs(0.01), base)
    assert single.rejected > 0.3 * single.sent
    assert batched.rejected < 0.01 * batched.sent
    assert np.mean(batched.batches) > 2


def test_the_bound_of_the_queue_bounds_the_wait() -> None:
    found = simulate(costs(0.02), Setting(rate=200, seconds=30, max_batch=1, max_wait=0.2))
    assert found.rejected > 0.5 * found.sent
    assert max(found.seconds) <= 0.2 + 2 * 0.02


def test_replicas_share_the_load_and_redis_their_states() -> None:
    one = simulate(costs(0.01), Setting(rate=60, seconds=40, affine=False))
    pair = Setting(rate=120, seconds=40, replicas=2, affine=False, users=500)
    two, affine = simulate(costs(0.01), replace(pair, users=5000)), simulate(costs(0.01), replace(pair, affine=True))
    spread, redis = simulate(costs(0.01), pair), simulate(costs(0.01), replace(pair, redis_seconds=0.001))
    assert two.row()["p95_ms"] == pytest.approx(one.row()["p95_ms"], rel=0.15)
    assert spread.row()["cached"] < affine.row()["cached"] - 0.05
    assert redis.row()["cached"] == pytest.approx(affine.row()["cached"], abs=0.03)
    assert redis.cache["redis"] > 0


def test_costs_are_found_again_in_the_answers_they_made() -> None:
    """Answers written from known costs; those of one batch tell the same times."""
    rng, answers = np.random.default_rng(0), []
    for number in range(400):
        steps, mates = (0, 2, 4)[number % 3], 1 + number % 4
        misses = int(rng.integers(0, mates + 1))
        times = {
            "queue": 5.0, "cache": 0.0, "encode": (1 + 2 * misses if misses else 0) + 1e-3 * (number % 7),
            "reason": steps + 1e-6 * number, "decode": 3 + 0.06 * 50 * mates,
        }  # fmt: skip
        times["encode"] = times["encode"] if misses else 0.0
        for mate in range(mates):
            cache = "miss" if mate < misses else "memory"
            ms = 7 + sum(times.values())
            answers.append({"reasoning_steps": steps, "beam_width": 50, "cache": cache, "timings_ms": times, "ms": ms,
                            "at": 0.1 * number})  # fmt: skip
    found = fit(answers)
    for steps in (0, 2, 4):
        assert found.search[steps] == pytest.approx((0.003 + steps / 1000, 0.00006), rel=0.02)
    assert found.encode == pytest.approx((0.001, 0.002), rel=0.02)
    assert all(value == pytest.approx(1, abs=0.01) for _, value in found.noise)
    assert all(value == pytest.approx(0.007, abs=1e-4) for _, value in found.overhead)
    again = from_json(to_json(replace(found, auto_steps=(0, 2))))
    assert again.search == found.search and again.encode == found.encode and again.auto_steps == (0, 2)
    assert len(again.noise) == 400


def test_auto_takes_no_steps_that_the_model_does_not_gain_by() -> None:
    """A step takes 20 ms here, and a tenth of the traffic leaves their number open."""
    slow = ServiceTimes({steps: (0.02 * steps, 0.0) for steps in range(5)}, (0.0, 0.0), FLAT, [(0.0, 0.0), (1.0, 0.0)])
    every, none = (
        simulate(replace(slow, auto_steps=auto), Setting(rate=2, seconds=300)) for auto in (tuple(range(5)), (0,))
    )
    assert fmean(every.seconds) - fmean(none.seconds) == pytest.approx(0.008, abs=0.004)


def test_price_falls_with_what_a_replica_answers() -> None:
    rows = [predict(costs(0.01), rate, replicas=1, price=1.0) for rate in (20, 60)]
    assert rows[0]["price_per_million"] == pytest.approx(1e6 / 20 / 3600, rel=0.02)
    assert rows[1]["price_per_million"] < rows[0]["price_per_million"]
    assert simulated(costs(0.01, overhead=0.005), Setting(rate=1, seconds=50))["p50_ms"] == pytest.approx(15, abs=0.5)


@pytest.mark.parametrize(("users", "requests"), [(5000, 300), (200_000, 50_000)])
def test_users_are_counted_without_counting_them_one_by_one(users: int, requests: int) -> None:
    whole = float((1 - np.exp(-requests * zipf(users, 1.0))).sum())
    assert users_seen(users, requests) == pytest.approx(whole, rel=0.01)
