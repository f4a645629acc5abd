"""How many reasoning steps fit a time budget: running times as measured, per (steps, beam width)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WINDOW = 128  # runs remembered per configuration
HALF_LIFE = 60.0  # seconds after which an estimate that nothing renews counts for half


@dataclass(slots=True)
class _Runs:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    last: float = 0.0

    def p95(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[math.ceil(0.95 * len(ordered)) - 1]


class Planner:
    """Chooses the largest number of steps whose p95 fits. Fed with every run; used by the event loop's thread only."""

    def __init__(self, tokens_per_item: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens_per_item, self._clock = tokens_per_item, clock
        self._runs: dict[tuple[int, int], _Runs] = {}

    def observe(self, steps: int, beam_width: int, seconds: float) -> None:
        """One run of a search took so long."""
        runs = self._runs.setdefault((steps, beam_width), _Runs())
        runs.seconds.append(seconds)
        runs.last = self._clock()

    def choose(self, seconds: float, beam_width: int, most: int) -> int | None:
        """The largest number of steps up to `most` that fits into `seconds`; None if not even 0 does."""
        for steps in range(most, -1, -1):
            if self.estimate(steps, beam_width) <= seconds:
                return steps
        return None

    def hopeless(self, seconds: float, steps: int, beam_width: int) -> bool:
        """Whether even the fastest run measured of this configuration would not fit."""
        runs = self._runs.get((steps, beam_width))
        return runs is not None and min(runs.seconds) * self._trust(runs) > seconds

    def estimate(self, steps: int, beam_width: int) -> float:
        """Seconds (p95) of a configuration; scaled by beam rows times decoder steps from the nearest measured one."""
        runs = self._runs.get((steps, beam_width))
        if runs is not None:
            return runs.p95() * self._trust(runs)
        if not self._runs:
            return 0.0  # nothing known: try
        work = self._work(steps, beam_width)
        nearest = min(self._runs, key=lambda key: abs(math.log(self._work(*key) / work)))
        return self._runs[nearest].p95() * self._trust(self._runs[nearest]) * work / self._work(*nearest)

    def table(self) -> list[dict[str, Any]]:
        """What was measured, for people: one row per configuration, milliseconds."""
        return [
            {
                "reasoning_steps": steps,
                "beam_width": beam,
                "p95_ms": round(1000 * runs.p95(), 2),
                "runs": len(runs.seconds),
            }
            for (steps, beam), runs in sorted(self._runs.items())
        ]

    def _trust(self, runs: _Runs) -> float:
        # A configuration once measured slow is never chosen, so never measured again: old estimates must fade.
        return 0.5 ** ((self._clock() - runs.last) / HALF_LIFE)

    def _work(self, steps: int, beam_width: int) -> int:
        return max(1, (self._tokens_per_item + steps) * beam_width)
