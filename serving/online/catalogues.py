"""The live catalogues of all models that are loaded, and the part of the log of changes that is about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from serving.errors import StoreError
from serving.online.changelog import ChangeLog, Entry
from serving.online.live_catalogue import LiveCatalogue
from serving.online.searching import EngineLike

KIND = "catalogue"  # of the log's entries


class Catalogues:
    """between_batches: runs something on the engine's thread. All happens on the event loop."""

    def __init__(self, log: ChangeLog, between_batches: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._log, self._between_batches = log, between_batches
        self._by_version: dict[str, LiveCatalogue] = {}
        self._entries = 0  # that have been applied, or are being

    def of(self, version: str) -> LiveCatalogue:
        return self._by_version[version]

    async def add(self, engine: EngineLike) -> None:
        """Follows the changes for one more model, once it has those made so far.

        Raises StoreUnavailable and StoreError."""
        catalogue, position, applied = LiveCatalogue(engine, self._between_batches), "", 0
        while applied < self._entries:
            found = await self._log.read(position)
            if not found:
                raise StoreError("The log of changes is shorter than it was; restore it, and start the service again.")
            entries = [entry for _, entry in found if entry.get("kind") == KIND][: self._entries - applied]
            await catalogue.apply(entries)
            applied, position = applied + len(entries), found[-1].position
        catalogue.start()
        self._by_version[engine.bundle.version] = catalogue

    async def keep(self, versions: Iterable[str]) -> None:
        """Forgets the catalogues of all other models."""
        for version in set(self._by_version).difference(versions):
            await self.forget(version)

    async def forget(self, version: str) -> None:
        catalogue = self._by_version.pop(version, None)
        if catalogue is not None:
            await catalogue.close()

    async def apply(self, entries: Sequence[Entry]) -> dict[str, list[int | Exception]]:
        """Applies entries of the log to every catalogue. Returns the results by model: see `LiveCatalogue.apply`."""
        self._entries += len(entries)
        return {version: await catalogue.apply(entries) for version, catalogue in list(self._by_version.items())}
