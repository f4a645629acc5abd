"""Waiting for an event, however slow the machine: the one deadline of all tests, and no other number of seconds."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

DEADLINE = 240.0  # seconds; only a fault takes that long


def eventually(check: Callable[[], object]) -> None:
    """Waits until `check` holds."""
    deadline = time.monotonic() + DEADLINE
    while not check():
        assert time.monotonic() < deadline, f"{_source(check)} did not hold within {DEADLINE:.0f} s"
        time.sleep(0.01)


async def eventually_async(check: Callable[[], object | Awaitable[object]]) -> None:
    """Waits until `check`, or what it returns to be awaited, holds; the event loop runs meanwhile."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = check()
        if await found if inspect.isawaitable(found) else found:
            return
        assert time.monotonic() < deadline, f"{_source(check)} did not hold within {DEADLINE:.0f} s"
        await asyncio.sleep(0.005)


def _source(check: Callable[..., object]) -> str:
    try:
        return inspect.getsource(check).strip()
    except (OSError, TypeError):  # not written in Python
        return repr(check)
