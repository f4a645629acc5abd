"""Tells a hung engine from a slow one. Knows no thread, no model and no probe: it sees what runs, and counts.

Time is counted from look to look, and a look counts at most two intervals: a process that was stopped and a laptop that
slept age no call, and neither does an event loop that comes late.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_EVERY = 1.0  # seconds
SLOWEST = 50.0  # times its prediction: a batch on a machine that others use; a batch repeated one by one takes 16


class Watchdog:
    """patience: seconds that a call may always take, however little was predicted for it."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._looked, self._age = clock(), 0.0
        self._call: object | None = None

    def look(self, call: object | None, prediction: float = 0.0) -> float | None:
        """The age in seconds of the running call if it is hung, else None. To be called every LOOK_EVERY seconds.

        call: what runs, another one for every call; None: nothing. prediction: seconds it should take.
        """
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * LOOK_EVERY), now
        if call is None or call != self._call:
            self._call, self._age = call, 0.0
            return None
        self._age += passed
        return self._age if self._age > max(self._patience, SLOWEST * prediction) else None
