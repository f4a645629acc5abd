"""Live catalogues of several models: all get the same changes, also a model that is loaded later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.engine import Engine
from serving.errors import NoSemanticId, StoreError
from serving.online.catalogues import KIND, Catalogues
from serving.online.changelog import Entry, MemoryLog
from serving.types import Request
from tests.builders import tiny_model

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
