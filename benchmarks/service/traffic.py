"""The traffic of a shop, as an endless draw: who asks, with which history, steps and rules. It is sent or simulated.

Users ask by Zipf's law: the user of rank r in proportion to 1 / r**skew. A user's history grows while they look around,
so that a state cached for it is no longer theirs; who only reloads is answered from the cache. Knows no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GROWS = 0.6  # share of visits since whose last one the user has looked at another item
LONGEST = 50  # items after which a user starts anew, as one who comes back after months
BATCH = 4096  # draws made at once: numpy's cost is per call

# What is asked for, and how often. A request with a time budget leaves the steps to the service.
STEPS: dict[int | str, float] = {0: 0.4, 2: 0.3, 4: 0.2, "auto": 0.1}
BUDGET_MS = 250.0
RULES = {"none": 0.7, "category": 0.1, "deny": 0.1, "allow": 0.1}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `version` numbers the user's history: a cached state serves the version it was made from."""

    user: int
    version: int
    history: tuple[int, ...]  # places in a list of items, oldest first
    steps: int | str
    rule: str


class Traffic:
    """Draws requests of `users` users over `items` items."""

    def __init__(self, users: int, items: int, skew: float = 1.0, seed: int = 0) -> None:
        self._rng, self._items = np.random.default_rng(seed), items
        self._shares = np.cumsum(zipf(users, skew))
        self._histories: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._drawn: list[tuple[int, bool, int, int | str, str]] = []

    def next(self) -> Ask:
        if not self._drawn:
            self._drawn = self._draw()
        user, grows, item, steps, rule = self._drawn.pop()
        version, history = self._histories.get(user, (0, ()))
        if grows or not history:
            version, history = version + 1, (*history, item) if len(history) < LONGEST else (item,)
            self._histories[user] = version, history
        return Ask(user, version, history, steps, rule)

    def _draw(self) -> list[tuple[int, bool, int, int | str, str]]:
        rng = self._rng
        users = np.searchsorted(self._shares, rng.random(BATCH) * self._shares[-1], side="right")
        steps = rng.choice(len(STEPS), BATCH, p=list(STEPS.values()))
        rules = rng.choice(len(RULES), BATCH, p=list(RULES.values()))
        kinds, names = list(STEPS), list(RULES)
        return [
            (int(user), bool(grows), int(item), kinds[step], names[rule])
            for user, grows, item, step, rule in zip(
                users, rng.random(BATCH) < GROWS, rng.integers(0, self._items, BATCH), steps, rules, strict=True
            )
        ]


def zipf(users: int, skew: float) -> np.ndarray:
    """The share of the requests that each user makes, the busiest first. Shape: (users,), sum 1."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -skew
    return weights / weights.sum()


def body(ask: Ask, items: list[str], categories: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The request as HTTP takes it: its query and its JSON. `items`, `categories`: names to draw from."""
    sent: dict[str, Any] = {"user_id": f"load-{ask.user}", "history": [items[place] for place in ask.history]}
    match ask.rule:
        case "category" if categories:
            sent["categories"] = [categories[ask.user % len(categories)]]
        case "deny":
            sent["deny"] = items[:10]
        case "allow":
            sent["allow"] = items
    if ask.steps == "auto":
        sent["timeout_ms"] = BUDGET_MS
    return {"reasoning_steps": str(ask.steps)}, sent


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time with one mean rate of arrivals. `judged`: whether its p99 and errors decide the run."""

    name: str
    seconds: float
    rate: int  # requests a second
    judged: bool = False


def profile(rate: int, seconds: float) -> list[Phase]:
    """Up in five steps, steady, a spike of three times as much, and what comes after it."""
    ramp = [Phase(f"ramp {step}", seconds / 2, max(1, rate * step // 6)) for step in range(1, 6)]
    return [*ramp, Phase("steady", 2 * seconds, rate, True), Phase("spike", seconds / 2, 3 * rate),
            Phase("after", seconds, rate)]  # fmt: skip


def turns(rates: list[int], rounds: int, seconds: float) -> list[Phase]:
    """The rates one after the other, again and again: a noisy moment of the machine hits them all."""
    return [Phase(str(rate), seconds, rate, True) for _ in range(rounds) for rate in rates]


def phase_at(phases: list[Phase], seconds: float) -> Phase | None:
    """The phase so many seconds after the start; None once all are over."""
    for phase in phases:
        if seconds < phase.seconds:
            return phase
        seconds -= phase.seconds
    return None
