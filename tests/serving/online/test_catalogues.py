"""Live catalogues of several models: all get the same changes, also a model that is loaded later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.engine import Engine
from serving.errors import NoSemanticId, StoreError
from serving.online.catalogues import KIND, Catalogues
from serving.online.changelog import Entry, MemoryLog
from serving.online.live_catalogue import FEW_EDGES, LiveCatalogue
from serving.types import Request
from tests.builders import tiny_model
from tests.waiting import DEADLINE

NOTHING = {"brand": None, "description": None, "fields": {}, "available_from": None, "available_until": None}
CODES = {"codes_of": "tiny-0", "codes": [0, 0], "last_codes": [3, 2]}


def put(item: str, title: str, **more: Any) -> Entry:
    return {"kind": KIND, "do": "put", "item_id": item, "title": title, "categories": ["new"], **NOTHING, **more}


def delete(item: str) -> Entry:
    return {"kind": KIND, "do": "delete", "item_id": item}


async def at_once(work: Callable[[], Any]) -> Any:
    return work()


def found(engine: Engine) -> set[int]:
    [answer] = engine.search([Request((1, 2), 100, 100, 0)], engine.encode([(1, 2)]))
    return set(answer.items)


def test_a_model_that_is_loaded_later_has_the_changes_made_before() -> None:
    async def check() -> None:
        log, first = MemoryLog(), Engine(tiny_model())
        second = Engine(replace(tiny_model(), version="second"))
        catalogues = Catalogues(log, at_once)
        await catalogues.add(first)
        await log.append([{"kind": "of something else"}])
        for entries in (
            [put("lamp", "Lamp", **CODES), delete("i3")],
            [put("i5", "Five"), delete("i4"), put("i4", "4")],
        ):
            await log.append(entries)
            results = await catalogues.apply(entries)
        assert results == {"tiny-0": [5, 4, 4]}
        await log.append([delete("i9")])  # is in the log, and applied by nobody yet
        await catalogues.add(second)
        assert second.bundle.catalogue.titles[4:6] == first.bundle.catalogue.titles[4:6] == ["4", "Five"]
        assert found(first) == {*range(61)} - {3} and found(second) == {*range(60)} - {3}
        results = await catalogues.apply([delete("i9"), put("vase", "Vase", **{**CODES, "codes": [1, 1]})])
        assert results["tiny-0"] == [9, 61] and results["second"][0] == 9
        assert isinstance(results["second"][1], NoSemanticId)  # it has codes of its own, and here no tokenizer
        assert not {3, 9} & (found(first) | found(second))
        await catalogues.forget("tiny-0")
        assert list(await catalogues.apply([delete("i1")])) == ["second"]
        await catalogues.keep(())

    asyncio.run(check())


def test_new_items_take_the_nearest_free_codes_in_the_order_of_the_log() -> None:
    async def check() -> None:
        first, other = Engine(tiny_model()), Engine(tiny_model())
        entries = [put(f"n{n}", "the same text", **CODES) for n in range(6)]
        made = []
        for engine in (first, other):
            catalogues = Catalogues(MemoryLog(), at_once)
            await catalogues.add(engine)
            made.append((await catalogues.apply(entries))["tiny-0"])
            await catalogues.keep(())
        rows = [row for row in made[0] if isinstance(row, int)]
        assert [row for row in made[1] if isinstance(row, int)] == rows
        assert all(isinstance(result, int | NoSemanticId) for result in made[0]) and len(rows) < 6
        tokens = first.bundle.catalogue.tokens
        np.testing.assert_array_equal(tokens, other.bundle.catalogue.tokens)
        assert len(np.unique(tokens, axis=0)) == len(tokens)
        before = {tuple(each) for each in tokens[:60].tolist()}
        offsets = first.bundle.vocabulary.level_offsets
        free = [code for code in (3, 2, 0, 1) if tuple((np.array([0, 0, code]) + offsets).tolist()) not in before]
        assert [int(tokens[row][2] - offsets[2]) for row in rows] == free

    asyncio.run(check())


def test_a_log_that_lost_entries_is_an_error_for_a_model_that_is_loaded_later() -> None:
    async def check() -> None:
        catalogues = Catalogues(MemoryLog(), at_once)
        await catalogues.add(Engine(tiny_model()))
        await catalogues.apply([delete("i3")])
        with pytest.raises(StoreError, match="shorter than it was"):
            await catalogues.add(Engine(replace(tiny_model(), version="second")))
        await catalogues.keep(())

    asyncio.run(check())


def test_an_entry_that_cannot_be_applied_takes_no_other_with_it() -> None:
    """So it does not matter in which pieces a process reads the log."""
    damaged = {"kind": KIND, "do": "put", "item_id": "lamp"}
    entries = [
        put("i5", "Five"),
        {"kind": KIND, "do": "rename", "item_id": "i6"},
        damaged,
        delete("i4"),
        {"kind": KIND},
    ]

    async def check() -> None:
        for pieces in ([entries], [[entry] for entry in entries]):
            engine, catalogues = Engine(tiny_model()), Catalogues(MemoryLog(), at_once)
            await catalogues.add(engine)
            results = [result for piece in pieces for result in (await catalogues.apply(piece))["tiny-0"]]
            assert [isinstance(result, Exception) for result in results] == [False, True, True, False, True]
            assert "rename" in str(results[1])
            assert engine.bundle.catalogue.titles[5] == "Five" and found(engine) == {*range(60)} - {4}
            await catalogues.keep(())

    asyncio.run(check())


def test_an_item_that_is_put_twice_keeps_its_first_codes_however_the_log_is_read() -> None:
    """What is put again has no codes, for the item has some; a process that reads both at once must not make others.

    Where the first is refused, here because its codes are of another model, the second adds the item with its own."""
    entries = [
        put("lamp", "Lamp", **CODES), put("lamp", "Other"), put("bare", "Bare", **CODES), put("bare", ""),
        put("late", "Late", **{**CODES, "codes_of": "other"}), put("late", "Again", **CODES), put("late", "At last"),
    ]  # fmt: skip

    async def check() -> None:
        outcomes = []
        for size in (1, 2, 3, len(entries)):
            known = (engine := Engine(tiny_model(sizes=(6, 5, 40)))).bundle.catalogue
            catalogue = LiveCatalogue(engine, at_once)
            pieces = [entries[at : at + size] for at in range(0, len(entries), size)]
            results = [result for piece in pieces for result in await catalogue.apply(piece)]
            rows = [result if isinstance(result, int) else type(result) for result in results]
            outcomes.append((rows, list(known.titles[60:]), known.tokens[60:].tolist()))
            await catalogue.close()
        assert outcomes[0][:2] == ([60, 60, 61, 61, NoSemanticId, 62, 62], ["Other", "", "At last"])
        assert all(outcome == outcomes[0] for outcome in outcomes)

    asyncio.run(check())


def test_windows_that_are_put_again_and_again_are_not_kept() -> None:
    far = time.time() + 1e6

    async def check() -> None:
        catalogue = LiveCatalogue(Engine(tiny_model()), at_once)
        for day in range(3 * FEW_EDGES):
            until = far + day // 2 if day < 2 * FEW_EDGES else None
            await catalogue.apply([put("i3", "Three", available_until=until)])
            assert catalogue.window(3) == (None, until) and len(catalogue._edges) <= FEW_EDGES + 4
        await catalogue.apply([put("i4", "Four", available_until=far)])
        assert (far, 4) in catalogue._edges
        await catalogue.close()

    asyncio.run(check())


def test_windows_are_kept_after_one_could_not_be(caplog: pytest.LogCaptureFixture) -> None:
    """Such as for lack of memory; what could not be brought into the search comes with the next."""

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    async def check() -> None:
        clock, engine, fails = Clock(), Engine(tiny_model()), asyncio.Event()

        async def between_batches(work: Callable[[], Any]) -> Any:
            if clock.now == 10 and not fails.is_set():
                fails.set()
                raise MemoryError("no room for now")
            return work()

        catalogue = LiveCatalogue(engine, between_batches, clock)
        catalogue.start()
        await catalogue.apply([put(f"i{row}", "timed", available_until=10.0 * (row - 2)) for row in (3, 4)])
        for clock.now in (10.0, 20.0):
            catalogue._edges_changed.set()
            while catalogue._edges and catalogue._edges[0][0] <= clock.now or not fails.is_set():
                await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE):
            while found(engine) != {*range(60)} - {3, 4}:
                await asyncio.sleep(0)
        await catalogue.close()

    asyncio.run(check())
    assert "no room for now" in caplog.text
