"""Which items an expression is true of: all items by the index of their fields or by passes, some by their values.

A condition on a field that an item does not have, or has with a value of another type, is false.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from serving.items.field_index import ColumnKind, FieldIndex, Key
from serving.items.fields import Fields
from serving.items.filters import (
    Compare,
    Differs,
    Equals,
    Expression,
    Has,
    Joined,
    Moment,
    Not,
    Value,
    Word,
    conditions,
    values_of,
)
from serving.items.value_index import ValueIndex, has_value

JOIN: dict[Word, np.ufunc] = {"and": np.bitwise_and, "or": np.bitwise_or}
COMPARE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
IN_CACHE = 1 << 16  # values that are compared with all of a list before the next
MANY_CODES = 6  # of strings in a list, above which a table of all codes is faster
FEW = 32  # items whose lists are read one by one


@dataclass(frozen=True, slots=True)
class Items:
    """Some items: by `index`, (count,) int64, their rows; without it, by their positions, the first `count`."""

    fields: Fields
    count: int
    index: np.ndarray | None = None


def matching(expression: Expression, items: Items, now: float) -> np.ndarray:
    """Of which items an expression is true. now: seconds since 1970. Shape: (count,) bool."""
    if items.index is not None:
        return _matching(expression, _Some(items.fields, items.fields.order.positions_of(items.index)), now)
    index = items.fields.index(_keys(expression), items.count)
    outdated = index.outdated(items.count)
    mask = _matching(expression, _All(items.fields, index), now)
    found: np.ndarray = np.unpackbits(mask, count=items.count, bitorder="little").view(np.bool)
    if len(outdated):
        found[outdated] = _matching(expression, _Some(items.fields, outdated), now)
    return found


def _keys(expression: Expression) -> set[Key]:
    """The columns that it reads."""
    compared = (each for each in conditions(expression) if not isinstance(each, Has))
    return {(each.field, _kind(value)) for each in compared for value in values_of(each)}


def _matching(expression: Expression, items: _All | _Some, now: float) -> np.ndarray:
    """In the form of `items`; not to be written to."""
    match expression:
        case Joined(word, parts):
            return reduce(JOIN[word], (_matching(part, items, now) for part in parts))
        case Not(part):
            inverted: np.ndarray = ~_matching(part, items, now)
            return inverted
        case Has(field, texts):
            return items.having(field, texts)
        case Compare(field, order, value):
            column = items.column(field, _kind(value))
            return items.none() if column is None else column.compared(order, _number(value, now))
        case Differs(field, bool(value)):
            return _among(items, field, [not value], now)
        case Differs(field, value):
            column = items.column(field, _kind(value))
            others: list[Value] = [value]
            if isinstance(value, str):
                others += [True, False]  # which are no strings
            return items.none() if column is None else column.every() & ~_among(items, field, others, now)
        case Equals(field, values):
            kinds: dict[ColumnKind, list[Value]] = {}
            for value in values:
                kinds.setdefault(_kind(value), []).append(value)
            return reduce(np.bitwise_or, (_among(items, field, some, now) for some in kinds.values()))


def _among(items: _All | _Some, field: str, values: Sequence[Value], now: float) -> np.ndarray:
    """Where a field is one of these values, which are of one kind."""
    column, strings = items.column(field, _kind(values[0])), items.fields.strings.get(field)
    if column is None:
        return items.none()
    if strings is None or not isinstance(values[0], str | bool):
        return column.among(np.array([_number(each, now) for each in values]))
    codes = (strings.numbers.get(each) for each in values if isinstance(each, str | bool))
    return column.among(np.array([code for code in codes if code is not None], np.int32))


def _kind(value: Value) -> ColumnKind:
    return "string" if isinstance(value, str | bool) else "time" if isinstance(value, Moment) else "number"


def _number(value: Value, now: float) -> float:
    """A number, or the time of a moment."""
    return value.at(now) if isinstance(value, Moment) else float(value)


@dataclass(frozen=True, slots=True)
class _All:
    """The items that an index knows, eight a byte: (index.bytes,) uint8."""

    fields: Fields
    known: FieldIndex

    def none(self) -> np.ndarray:
        return np.zeros(self.known.bytes, np.uint8)

    def column(self, field: str, kind: ColumnKind) -> ValueIndex | _Values | None:
        if (indexed := self.known.columns.get((field, kind))) is not None:
            return indexed
        column = self.fields.column(field, kind)
        return None if column is None else _Values(column[: self.known.rows], packed=True)

    def having(self, field: str, names: Sequence[str]) -> np.ndarray:
        labels = self.fields.lists.get(field)
        return self.none() if labels is None else labels.having(names, self.known.rows)


@dataclass(frozen=True, slots=True)
class _Some:
    """Items by their positions, (n,) int64, as (n,) bool."""

    fields: Fields
    positions: np.ndarray

    def none(self) -> np.ndarray:
        return np.zeros(len(self.positions), bool)

    def column(self, field: str, kind: ColumnKind) -> _Values | None:
        column = self.fields.column(field, kind)
        return None if column is None else _Values(column[self.positions])

    def having(self, field: str, names: Iterable[str]) -> np.ndarray:
        labels, wanted = self.fields.lists.get(field), set(names)
        if labels is None:
            return self.none()
        if len(self.positions) > FEW:
            return labels.among(self.positions, wanted)
        rows = self.fields.order.rows_at(self.positions).tolist()
        return np.array([not wanted.isdisjoint(labels.of(row)) for row in rows], bool)


@dataclass(frozen=True, slots=True)
class _Values:
    """What `ValueIndex` says of a column, by a pass over the values themselves. packed: in masks like that one's."""

    values: np.ndarray
    packed: bool = False

    def every(self) -> np.ndarray:
        return self._mask(has_value(self.values))

    def compared(self, order: str, value: float) -> np.ndarray:
        return self._mask(COMPARE[order](self.values, value))

    def among(self, values: np.ndarray) -> np.ndarray:
        if len(values) > MANY_CODES and values.dtype == np.int32:
            table = np.zeros(values.max() + 2, bool)  # whose end stands for all codes above, and for -1
            table[values] = True
            return self._mask(table.take(self.values.view(np.uint32), mode="clip"))
        parts = (self.values[begin : begin + IN_CACHE] for begin in range(0, len(self.values), IN_CACHE))
        is_so = [np.isin(part, values, kind="sort") for part in parts]  # which compares with one value after another
        return self._mask(np.concatenate([np.zeros(0, bool), *is_so]))

    def _mask(self, is_so: np.ndarray) -> np.ndarray:
        return np.packbits(is_so, bitorder="little") if self.packed else is_so
