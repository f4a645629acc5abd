"""Scans of a whole catalogue: too long for the event loop, and no work for the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from serving.errors import Overloaded

T = TypeVar("T")

MAX_WAITING = 32  # scans; one runs at a time, so that it takes one core from the engine


class CatalogueScans:
    """Runs them one by one, each in a thread. To be called on one event loop."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Raises what the work raises, and Overloaded where too many wait."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded("Too many requests wait to look at the whole catalogue; try again shortly.", 1.0)
        self._waiting += 1
        try:
            async with self._one:
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1
