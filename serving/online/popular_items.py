"""The items that are most popular in the bundle, for those of whom nothing is known and behind what is popular now."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from serving.items.catalogue import Catalogue
from serving.online.scans import CatalogueScans
from serving.types import Boost, Rules

Key = tuple[int, Rules, tuple[Boost, ...]]


class PopularItems:
    """Those of one catalogue, which may change meanwhile. To be called on one event loop."""

    def __init__(self, catalogue: Catalogue, scans: CatalogueScans) -> None:
        self.catalogue, self._scans = catalogue, scans
        self._running: dict[Key, asyncio.Task[list[int]]] = {}

    async def find(self, k: int, rules: Rules, boosts: Sequence[Boost] = ()) -> list[int]:
        """`Catalogue.popular`: at once where few rows tell, else by a pass, which equal requests share.

        Raises UnknownCatalogue and RequestError, and Overloaded where too many wait for a pass."""
        catalogue, key = self.catalogue, (k, rules, tuple(boosts))
        if not boosts and (found := catalogue.popular_at_once(k, rules)) is not None:
            return found
        rows = await self._passed(key)
        permitted = catalogue.permitted_indices(rows, rules)
        if len(permitted) < len(rows):  # what was taken away meanwhile makes room for others
            rows = await self._passed(key)
            permitted = catalogue.permitted_indices(rows, rules)
        return [rows[index] for index in permitted]

    async def _passed(self, key: Key) -> list[int]:
        if key not in self._running:
            task = asyncio.create_task(self._scans.run(partial(self.catalogue.popular, *key)))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(self._running[key])  # others may want it when this one's client has gone
