"""Models that are loaded while others answer: a version is opened once, whoever adds it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serving.errors import BundleError, Conflict
from serving.online.models import Models
from serving.online.recommender import Recommender


def model(version: str) -> Recommender:
    return cast(Recommender, SimpleNamespace(bundle=SimpleNamespace(version=version)))


def addition(version: str) -> dict[str, Any]:
    return {"base": "base", "do": "add", "version": version, "path": version}


class Shelf:
    """Opens models once `may_open` is set."""

    def __init__(self, version: str = "next") -> None:
        self.version, self.opened = version, list[Recommender]()
        self.may_open = asyncio.Event()

    async def open(self, path: str) -> Recommender:
        await self.may_open.wait()
        self.opened.append(model(self.version))
        return self.opened[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_version_that_two_processes_add_at_the_same_time_is_opened_once(fails: bool) -> None:
    """fails: the log does not take this process's own change; then the other one's still holds."""

    async def check() -> None:
        shelf = Shelf()
        models = Models(model("base"), shelf.open)
        staging = asyncio.create_task(models.stage("next", "next"))
        await asyncio.sleep(0)
        applying = asyncio.create_task(models.apply([addition("next")]))  # of the other process
        await asyncio.sleep(0)
        if fails:
            models.unstage("next")
        assert "next" in models.in_memory
        shelf.may_open.set()
        assert await staging == addition("next")
        assert await applying == [None]
        assert await models.apply([addition("next")]) == [None]
        models.unstage("next")
        assert models.loaded["next"] is shelf.opened[0] and len(shelf.opened) == 1
        assert models.in_memory == {"base", "next"}
        await models.close()

    asyncio.run(check())


def test_a_model_whose_change_came_to_nothing_is_dropped_and_can_be_loaded_again() -> None:
    async def check() -> None:
        shelf = Shelf()
        shelf.may_open.set()
        models = Models(model("base"), shelf.open)
        for _ in range(2):
            await models.stage("next", "next")
            models.unstage("next")
            assert models.in_memory == {"base"}
        assert len(shelf.opened) == 2
        other = Models(model("base"), shelf.open)
        with pytest.raises(BundleError, match="another version than awaited"):
            await other.stage("awaited", "next")
        assert await other.apply([addition("awaited")]) == [None]  # the other processes may have it
        assert other.in_memory == {"base"}

    asyncio.run(check())


def test_a_change_that_cannot_be_read_takes_no_other_with_it() -> None:
    async def check() -> None:
        shelf = Shelf()
        shelf.may_open.set()
        models = Models(model("base"), shelf.open)
        unreadable = [
            {"do": "add"},
            {"base": "base", "do": "add"},
            {"base": "base", "do": "direct", "arms": [{"x": 1}]},
        ]
        first, *others = await models.apply([addition("next"), *unreadable])
        assert first is None and all(isinstance(other, Conflict) for other in others) and len(others) == 3
        assert set(models.deployment.versions) == {"base", "next"}
        await models.close()

    asyncio.run(check())
