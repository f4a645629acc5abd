"""The traffic of a shop, drawn at random without end: users with their histories, steps and rules. Sent or simulated.

Users follow Zipf's law: the user of rank r makes requests in proportion to 1 / r**skew. Where a user has looked at
another item since the last request, the history has grown and the encoder state cached for it no longer fits; a
repeated request is answered from the cache. There is no clock in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GROWS = 0.6  # share of requests before which the user has looked at another item
LONGEST = 50  # items, after which a user starts a new history
BATCH = 4096  # draws per call of numpy

# Share of each kind of request. `auto` leaves the number of steps to the service, within a time budget.
STEPS: dict[int | str, float] = {0: 0.4, 2: 0.3, 4: 0.2, "auto": 0.1}
BUDGET_MS = 250.0
RULES = {"none": 0.7, "category": 0.1, "deny": 0.1, "allow": 0.1}


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `version` numbers the states of the user's history: a cached encoder state fits one version."""

    user: int
    version: int
    history: tuple[int, ...]  # indices into a list of items, oldest first
    steps: int | str
    rule: str


class Traffic:
    """Draws requests of `users` users over `items` items."""

    def __init__(self, users: int, items: int, skew: float = 1.0, seed: int = 0) -> None:
        self._rng, self._items = np.random.default_rng(seed), items
        self._shares = np.cumsum(zipf(users, skew))
        self._histories: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._drawn: list[tuple[int, bool, int, int | str, str]] = []

    def next(self) -> Request:
        if not self._drawn:
            self._drawn = self._draw()
        user, grows, item, steps, rule = self._drawn.pop()
        version, history = self._histories.get(user, (0, ()))
        if grows or not history:
            version, history = version + 1, (*history, item) if len(history) < LONGEST else (item,)
            self._histories[user] = version, history
        return Request(user, version, history, steps, rule)

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
    """Each user's share of the requests, the busiest first. Shape: (users,), sum 1."""
    weights: np.ndarray = np.arange(1, users + 1, dtype=np.float64) ** -skew
    weights /= weights.sum()
    return weights


def body(request: Request, items: list[str], categories: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The query and the JSON body of an HTTP request. `items`, `categories`: names to choose from."""
    sent: dict[str, Any] = {"user_id": f"load-{request.user}", "history": [items[index] for index in request.history]}
    match request.rule:
        case "category" if categories:
            sent["categories"] = [categories[request.user % len(categories)]]
        case "deny":
            sent["deny"] = items[:10]
        case "allow":
            sent["allow"] = items
    if request.steps == "auto":
        sent["timeout_ms"] = BUDGET_MS
    return {"reasoning_steps": str(request.steps)}, sent


@dataclass(frozen=True, slots=True)
class Phase:
    """A time with one mean rate of arrivals. `judged`: whether its p99 and errors decide if the run passes."""

    name: str
    seconds: float
    rate: int  # requests a second
    judged: bool = False


def profile(rate: int, seconds: float) -> list[Phase]:
    """A ramp of five steps, a steady phase, a spike of three times its rate, and the time after the spike."""
    ramp = [Phase(f"ramp {step}", seconds / 2, max(1, rate * step // 6)) for step in range(1, 6)]
    return [*ramp, Phase("steady", 2 * seconds, rate, True), Phase("spike", seconds / 2, 3 * rate),
            Phase("after", seconds, rate)]  # fmt: skip


def turns(rates: list[int], rounds: int, seconds: float) -> list[Phase]:
    """The rates one after the other, `rounds` times, so that a noisy moment of the machine affects all of them."""
    return [Phase(str(rate), seconds, rate, True) for _ in range(rounds) for rate in rates]


def phase_at(phases: list[Phase], seconds: float) -> Phase | None:
    """The phase at that many seconds after the start; None after the last."""
    for phase in phases:
        if seconds < phase.seconds:
            return phase
        seconds -= phase.seconds
    return None
