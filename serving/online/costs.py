"""What searches cost on this machine, as measured. Knows no model, no queue and no deadline.

The cost of a search is that of its batch, and a batch is its number of reasoning steps and its beam rows (beam width
times searches): two searches of 50 beams cost what one of 100 does. So the table has one entry per (steps, rows) of
each model.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WINDOW = 128  # runs remembered per entry
MAX_ENTRIES = 64  # per model and number of steps; beyond them the one measured longest ago is dropped
HALF_LIFE = 60.0  # seconds in which a slow estimate that nothing renews halves
BEST_HALF_LIFE = 600.0  # the same for the fastest run: an estimate falls below it only slowly
TYPICAL, LIKELY = 0.5, 0.95  # quantiles: the first for the length of a queue, the second for meeting a deadline


@dataclass(slots=True)
class _Runs:
    newest: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)
    last: float = 0.0

    def add(self, seconds: float, now: float) -> None:
        if len(self.newest) == WINDOW:
            self.ordered.remove(self.newest.popleft())
        self.newest.append(seconds)
        insort(self.ordered, seconds)
        self.last = now

    def at(self, quantile: float) -> float:
        return self.ordered[math.ceil(quantile * len(self.ordered)) - 1]


class CostTable:
    """Measured seconds per batch shape. The engine's thread writes it, the event loop's reads it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runs: dict[str, dict[int, dict[int, _Runs]]] = {}  # model -> steps -> beam rows -> runs
        self._lock = threading.Lock()

    def observe(self, steps: int, rows: int, seconds: float, model: str = "") -> None:
        """Records that a batch of so many steps and beam rows took so long."""
        with self._lock:
            entries, now = self._runs.setdefault(model, {}).setdefault(steps, {}), self._clock()
            entries.setdefault(rows, _Runs()).add(seconds, now)
            if len(entries) > MAX_ENTRIES:
                del entries[min(entries, key=lambda key: entries[key].last)]

    def forget(self, model: str) -> None:
        """Drops what was measured of a model that is gone."""
        with self._lock:
            self._runs.pop(model, None)

    def estimate(self, steps: int, rows: int, quantile: float = LIKELY, model: str = "") -> float:
        """The seconds within which `quantile` of such batches finish; 0 while nothing has been measured of the model.

        A shape that was never measured is assumed to cost what the next larger one does, of its own number of steps or
        of a larger one, whichever is less; and beyond the largest in proportion to its rows: too much rather than too
        little. More steps than were ever measured count as the most that were.
        """
        with self._lock:
            measured = self._runs.get(model)
            if not measured:
                return 0.0
            steps = min(steps, max(measured))
            entries = measured.get(steps, {})
            if rows in entries:
                return self._decayed(entries[rows], quantile)
            larger = [
                self._decayed(of_steps[min(known for known in of_steps if known >= rows)], quantile)
                for number, of_steps in measured.items()
                if number >= steps and max(of_steps) >= rows
            ]
            if larger:
                return min(larger)
            entries = entries or measured[min(number for number in measured if number > steps)]
            return self._decayed(entries[max(entries)], quantile) * rows / max(entries)

    def table(self, model: str = "") -> list[dict[str, Any]]:
        """The measurements of a model for people: milliseconds, one row per number of steps and of beam rows."""
        with self._lock:
            return [
                {
                    "reasoning_steps": steps,
                    "beam_rows": rows,
                    "median_ms": round(1000 * runs.at(TYPICAL), 2),
                    "p95_ms": round(1000 * runs.at(LIKELY), 2),
                    "runs": len(runs.ordered),
                }
                for steps, entries in sorted(self._runs.get(model, {}).items())
                for rows, runs in sorted(entries.items())
            ]

    def _decayed(self, runs: _Runs, quantile: float) -> float:
        # A shape once measured as slow is never chosen, and so never measured again: old estimates must decay.
        age = self._clock() - runs.last
        usual: float = runs.at(quantile) * 0.5 ** (age / HALF_LIFE)
        fastest: float = runs.ordered[0] * 0.5 ** (age / BEST_HALF_LIFE)
        return max(usual, fastest)
