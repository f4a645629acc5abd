"""Popular items of the bundle: at once where that is cheap, else by a pass that keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serving.errors import Overloaded
from serving.items.catalogue import Catalogue
from serving.online import scans
from serving.online.popular_items import PopularItems
from serving.online.scans import CatalogueScans
from serving.types import Rules
from tests.builders import tiny_model
from tests.waiting import DEADLINE

FEW = Rules(categories=("odd",))


class Held:
    """CatalogueScans over catalogues that end when the test lets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.running, self.most = 0, list[int]()
        popular: Callable[..., list[int]] = Catalogue.popular

        def held(*arguments: Any) -> list[int]:
            self.running += 1
            self.most.append(self.running)
            found = popular(*arguments)
            self.reached.set()
            assert self.opened.wait(DEADLINE)
            self.running -= 1
            return found

        monkeypatch.setattr(Catalogue, "popular", held)
        monkeypatch.setattr("serving.items.catalogue.WALKED", 5)


def test_what_the_most_popular_items_tell_waits_for_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = tiny_model().catalogue
    expected, boosts = catalogue.popular(60, Rules()), [catalogue.boost("size < 3", 2.0, 0.0)]
    held = Held(monkeypatch)

    async def go() -> None:
        items = PopularItems(catalogue, CatalogueScans())
        with_boost = asyncio.create_task(items.find(3, Rules(), boosts))
        many = asyncio.create_task(items.find(60, Rules()))
        await asyncio.sleep(0)
        assert await items.find(3, Rules()) == expected[:3]
        assert not with_boost.done() and not many.done()
        held.opened.set()
        assert (await with_boost, await many) == (expected[:3], expected)

    asyncio.run(go())
    assert held.most == [1, 1]  # one at a time


def test_equal_requests_share_a_pass_and_too_many_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = tiny_model().catalogue
    expected = catalogue.popular(60, FEW)
    monkeypatch.setattr(scans, "MAX_WAITING", 2)
    held = Held(monkeypatch)

    async def go() -> None:
        items = PopularItems(catalogue, CatalogueScans())
        same = [asyncio.create_task(items.find(9, FEW)) for _ in range(5)]
        other = asyncio.create_task(items.find(8, FEW))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # their passes wait
        with pytest.raises(Overloaded, match="try again"):
            await items.find(7, FEW)
        same.pop().cancel()  # a client has gone
        held.opened.set()
        assert await asyncio.gather(*same) == [expected[:9]] * 4 and await other == expected[:8]
        assert await items.find(7, FEW) == expected[:7]

    asyncio.run(go())
    assert held.most == [1, 1, 1]


def test_what_is_taken_away_during_a_pass_is_not_in_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = tiny_model().catalogue
    expected = catalogue.popular(60, FEW)
    held = Held(monkeypatch)

    async def go() -> None:
        items = PopularItems(catalogue, CatalogueScans())
        first = asyncio.create_task(items.find(9, FEW))
        assert await asyncio.to_thread(held.reached.wait, DEADLINE)
        catalogue.list_item(expected[2], False)
        second = asyncio.create_task(items.find(9, FEW))
        await asyncio.sleep(0)
        held.opened.set()
        assert await first == await second == [*expected[:2], *expected[3:10]]

    asyncio.run(go())
    assert held.most == [1, 1]  # the second look is shared as well
