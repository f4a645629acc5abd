"""Indexes of fields in the making: filters are exact before, meanwhile and after, whatever changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from serving.items import field_index
from serving.items.field_index import FieldIndex
from serving.items.fields import Fields
from serving.items.filter_parser import parse_filter
from serving.items.matching import Items, matching
from serving.items.value_index import ROW_BYTES, ValueIndex

ROWS = 200
CHEAP, OF_A_BRAND = "price < 50", 'brand == "b1" and not tags has "t"'


def fields_of(rows: int = ROWS) -> Fields:
    fields = Fields()
    fields.reserve(2 * rows)
    for row in range(rows):
        fields.put(row, {"price": row, "brand": f"b{row % 3}", "tags": ["t"][: row % 2]})
    return fields


def passing(fields: Fields, text: str, rows: int = ROWS) -> list[int]:
    found = matching(parse_filter(text).expression, Items(fields, rows), 0.0)
    assert found.shape == (rows,)
    return np.flatnonzero(found).tolist()


def index_of(fields: Fields, rows: int = ROWS) -> FieldIndex:
    return fields.index([], rows)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No index is made inside. The event is set once a column is copied for one."""
    copied, released = threading.Event(), threading.Event()

    def made(column: np.ndarray) -> ValueIndex:
        copied.set()
        released.wait()
        return ValueIndex(column)

    with monkeypatch.context() as patch:
        patch.setattr(field_index, "ValueIndex", made)
        try:
            yield copied
        finally:
            released.set()


def test_a_filter_waits_for_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = fields_of()
    with held(monkeypatch) as copied:
        cheap, of_a_brand = passing(fields, CHEAP), passing(fields, OF_A_BRAND)
        copied.wait()
        assert cheap == passing(fields, CHEAP) == list(range(50))
        assert of_a_brand == [row for row in range(ROWS) if row % 3 == 1 and row % 2 == 0]
        assert not index_of(fields).columns
    fields.indexes.wait()
    assert index_of(fields).columns.keys() == {("price", "number"), ("brand", "string")}
    assert passing(fields, CHEAP) == cheap and passing(fields, OF_A_BRAND) == of_a_brand


def test_what_changes_while_an_index_is_made_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = fields_of()
    with held(monkeypatch) as copied:
        assert passing(fields, CHEAP) == list(range(50))
        copied.wait()
        fields.put(0, {"price": 99})
        fields.put(ROWS, {"price": 1})
        expected = [*range(1, 50), ROWS]
        assert passing(fields, CHEAP, ROWS + 1) == expected
    fields.indexes.wait()
    assert passing(fields, CHEAP, ROWS + 1) == expected
    assert list(index_of(fields).changed) == [0, ROWS] and index_of(fields).rows == ROWS


def test_an_index_is_in_use_until_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_index, "MANY_CHANGED", 2)
    fields = fields_of()
    passing(fields, CHEAP), passing(fields, OF_A_BRAND)
    fields.indexes.wait()
    before = index_of(fields)
    for row in range(3):
        fields.put(row, {"price": 99})
    with held(monkeypatch) as copied:
        assert passing(fields, CHEAP) == list(range(3, 50))
        copied.wait()
        fields.put(3, {"price": 99})
        assert index_of(fields) is before and passing(fields, CHEAP) == list(range(4, 50))
        for row in range(100, 100 + 2 * field_index.TOO_MANY_CHANGED):  # more than it is worth to look at one by one
            fields.put(row, {"price": 0})
        assert not index_of(fields).columns
        expected = [*range(4, 50), *range(100, 116)]
        assert passing(fields, CHEAP) == expected
    fields.indexes.wait()
    assert passing(fields, CHEAP) == expected  # which has the next one made, for these changes
    fields.indexes.wait()
    after = index_of(fields)
    assert after.columns.keys() == before.columns.keys() and not after.changed
    assert passing(fields, CHEAP) == expected and passing(fields, OF_A_BRAND)[:2] == [4, 10]


def test_no_change_is_lost_however_threads_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One changes items and reads them; another reads on and on, and with it indexes are made."""
    monkeypatch.setattr(field_index, "MANY_CHANGED", 3)
    fields, done, rng = fields_of(), threading.Event(), np.random.default_rng(0)
    prices = np.arange(ROWS)
    others = threading.Thread(target=lambda: [passing(fields, CHEAP) for _ in iter(done.is_set, True)])
    others.start()
    try:
        for _ in range(300):
            row = int(rng.integers(ROWS))
            prices[row] = rng.integers(100)
            fields.put(row, {"price": int(prices[row])})
            assert passing(fields, CHEAP) == np.flatnonzero(prices < 50).tolist()
    finally:
        done.set()
        others.join()


def test_nothing_is_left_of_fields_that_are_gone() -> None:
    """Neither a thread nor what it has read. Filters that name lists, or no field that exists, start none."""
    of_others, fields = makers(), fields_of()
    assert passing(fields, 'tags has "t" or no < 1') == list(range(1, ROWS, 2))
    assert makers() <= of_others
    passing(fields, CHEAP)
    for maker in makers():
        maker.join()
    is_there = weakref.ref(fields)
    del fields
    assert is_there() is None and not makers()


def makers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "field index"}


@pytest.mark.parametrize("room", [3, 2])
def test_fields_are_indexed_early_where_that_takes_little_memory(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.items.fields.EARLY_BYTES", room * ROWS * ROW_BYTES)
    fields = fields_of()
    fields.put(0, {"added": "2026-01-01"})
    fields.index_early(ROWS)
    fields.indexes.wait()
    expected = {("price", "number"), ("brand", "string"), ("added", "time")} if room == 3 else set()
    assert index_of(fields).columns.keys() == expected
