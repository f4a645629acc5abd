"""The number of reasoning steps: what a request may say of it, and which numbers are worth their time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

Steps = int | Literal["auto"] | None  # of a request; None: the bundle's default


def worthwhile_steps(accuracy: Sequence[dict[str, Any]], max_steps: int) -> tuple[int, ...]:
    """The numbers of steps that gain something, fewest first; 0 is always among them, and often alone.

    More steps are worth it where the gain that they have for sure, the lower end of its 95% interval, is above what
    fewer steps gain already. The last of them is a bundle's default, and `auto` takes no other number.

    accuracy: a row per number of steps with its `gain` over 0 steps and `gain_low`. Where no row has these, as in a
    bundle of before they were measured, nothing is known against any number, and all of 0..max_steps are returned.
    """
    gains = {row["steps"]: row for row in accuracy if "gain_low" in row}
    if not gains:
        return tuple(range(max_steps + 1))
    worthwhile, reached = [0], 0.0
    for steps in range(1, max_steps + 1):
        if steps in gains and gains[steps]["gain_low"] > reached:
            worthwhile.append(steps)
            reached = gains[steps]["gain"]
    return tuple(worthwhile)
