"""Conditions on the fields of items: what they are, their text in one form, and which items they are true of.

`serving/items/filter_parser.py` reads them; docs/FILTERS.md describes the language. A condition on a field that an item
does not have, or has with a value of another type, is false.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from serving.items.fields import Fields, from_time

Word = Literal["and", "or"]
JOIN: dict[Word, np.ufunc] = {"and": np.logical_and, "or": np.logical_or}
COMPARE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MANY = 12  # comparisons for equality: as many take as long as to look every item up in a table
KEYWORDS = frozenset({"and", "or", "not", "in", "has", "now", "true", "false"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Moment:
    """A time: seconds since 1970, or from now."""

    seconds: float
    from_now: bool = False

    def at(self, now: float) -> float:
        return now + self.seconds if self.from_now else self.seconds


Value = str | float | bool | Moment
V = TypeVar("V", bound=Value)


@dataclass(frozen=True, slots=True)
class Compare:
    """The field is a number, or a time, in this order with the value."""

    field: str
    order: str
    value: float | Moment


@dataclass(frozen=True, slots=True)
class Equals:
    """The field is one of these values."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Differs:
    """The field is of this value's type, and another one."""

    field: str
    value: Value


@dataclass(frozen=True, slots=True)
class Has:
    """The field is a list with any of these in it."""

    field: str
    values: tuple[str, ...]


Condition = Compare | Equals | Differs | Has


@dataclass(frozen=True, slots=True)
class Not:
    part: Expression


@dataclass(frozen=True, slots=True)
class Joined:
    """All of the parts, or any of them."""

    word: Word
    parts: tuple[Expression, ...]


Expression = Condition | Not | Joined


def conditions(expression: Expression) -> Iterator[Condition]:
    match expression:
        case Not(part):
            yield from conditions(part)
        case Joined(_, parts):
            for part in parts:
                yield from conditions(part)
        case _:
            yield expression


def values_of(condition: Condition) -> tuple[Value, ...]:
    return condition.values if isinstance(condition, Equals | Has) else (condition.value,)


# As text


def distinct(values: Iterable[V]) -> tuple[V, ...]:
    """Each value once, in the order of their texts; 1 and true are two."""
    return tuple(value for _, value in sorted({_value(value): value for value in values}.items()))


def to_text(expression: Expression) -> str:
    """The same for expressions that differ in nothing but their spelling."""
    match expression:
        case Compare(field, order, value):
            return f"{_field(field)} {order} {_value(value)}"
        case Equals(field, (value,)):
            return f"{_field(field)} == {_value(value)}"
        case Equals(field, values):
            return f"{_field(field)} in {_list(values)}"
        case Differs(field, value):
            return f"{_field(field)} != {_value(value)}"
        case Has(field, (value,)):
            return f"{_field(field)} has {_value(value)}"
        case Has(field, values):
            return f"{_field(field)} has {_list(values)}"
        case Not(part):
            return f"not {_part(part)}"
        case Joined(word, parts):
            return f" {word} ".join(map(_part, parts))


def _part(expression: Expression) -> str:
    text = to_text(expression)
    return f"({text})" if isinstance(expression, Joined) else text


def _field(name: str) -> str:
    return name if _NAME.fullmatch(name) and name not in KEYWORDS else f"`{name}`"


def _list(values: tuple[Value, ...]) -> str:
    return f"[{', '.join(map(_value, values))}]"


def _value(value: Value) -> str:
    if not isinstance(value, Moment):
        return json.dumps(value, ensure_ascii=False)
    if not value.from_now:
        return json.dumps(from_time(value.seconds))
    return f"now {'-' if value.seconds < 0 else '+'} {abs(value.seconds)!r}s" if value.seconds else "now"


# Over items


@dataclass(frozen=True, slots=True)
class Items:
    """Some rows: the first `count` if there is no `index`, which is (count,) int64."""

    fields: Fields
    count: int
    index: np.ndarray | None = None

    def of(self, column: np.ndarray) -> np.ndarray:
        return column[: self.count] if self.index is None else column[self.index]


def matching(expression: Expression, items: Items, now: float) -> np.ndarray:
    """Of which items an expression is true. now: seconds since 1970. Shape: (count,) bool."""
    match expression:
        case Joined(word, parts):
            return _joined(JOIN[word], (matching(part, items, now) for part in parts))
        case Not(part):
            return ~matching(part, items, now)
        case Has(field, texts):
            return _having(items, field, texts)
        case Compare(field, order, value):
            return _compared(items, field, value, now, COMPARE[order])
        case Differs(field, value):
            return _differing(items, field, value, now)
        case Equals(field, values):
            coded = [value for value in values if isinstance(value, str | bool)]
            numbers = [value for value in values if isinstance(value, float)]
            times = [value.at(now) for value in values if isinstance(value, Moment)]
            masks = [_coded(items, field, coded)] if coded else []
            masks += [_among(items, items.fields.numbers.get(field), numbers)] if numbers else []
            masks += [_among(items, items.fields.times.get(field), times)] if times else []
            return _joined(np.logical_or, iter(masks))


def _joined(join: np.ufunc, masks: Iterator[np.ndarray]) -> np.ndarray:
    """All masks in one, the first of them: of many, only two take memory at a time."""
    found = next(masks)
    for mask in masks:
        join(found, mask, out=found)
    return found


def _compared(
    items: Items,
    field: str,
    value: float | Moment,
    now: float,
    compare: Callable[[np.ndarray, float], np.ndarray],
) -> np.ndarray:
    is_time = isinstance(value, Moment)
    column = (items.fields.times if is_time else items.fields.numbers).get(field)
    if column is None:
        return np.zeros(items.count, bool)
    return compare(items.of(column), value.at(now) if isinstance(value, Moment) else value)


def _among(items: Items, column: np.ndarray | None, values: list[float]) -> np.ndarray:
    if column is None:
        return np.zeros(items.count, bool)
    column = items.of(column)
    if len(values) <= MANY:
        return _joined(np.logical_or, (column == value for value in values))
    may_be = np.zeros(1 << 16, bool)
    may_be[_hashes(np.array(values))] = True
    found = may_be.take(_hashes(column))
    found[found] = np.isin(column[found], values)
    return found


def _hashes(values: np.ndarray) -> np.ndarray:
    """Shape: (n,) float64 -> (n,) int64, 16 bits each, the same for equal values."""
    bits = (values + 0.0).view(np.uint64)  # -0.0 is 0.0
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits >>= np.uint64(48)
    return bits.view(np.int64)


def _coded(items: Items, field: str, values: list[str | bool]) -> np.ndarray:
    strings = items.fields.strings.get(field)
    codes = [] if strings is None else [strings.numbers[value] for value in values if value in strings.numbers]
    if strings is None or not codes:
        return np.zeros(items.count, bool)
    column = items.of(strings.codes)
    if len(codes) <= MANY:
        return _joined(np.logical_or, (column == code for code in codes))
    is_one = np.zeros(len(strings.values) + 1, bool)
    is_one[codes] = True
    return is_one.take(column, mode="wrap")  # -1 is the last, which is none of them


def _differing(items: Items, field: str, value: Value, now: float) -> np.ndarray:
    if isinstance(value, bool):
        return _coded(items, field, [not value])
    if not isinstance(value, str):  # NaN differs from itself
        return _compared(items, field, value, now, lambda column, one: (column == column) & (column != one))
    strings = items.fields.strings.get(field)
    if strings is None:
        return np.zeros(items.count, bool)
    column = items.of(strings.codes)
    found = column >= 0
    for other in (value, True, False):
        if other in strings.numbers:
            found &= column != strings.numbers[other]
    return found


def _having(items: Items, field: str, texts: tuple[str, ...]) -> np.ndarray:
    labels = items.fields.lists.get(field)
    found = np.zeros(items.count, bool)
    if labels is not None and items.index is not None:
        wanted = set(texts)
        return np.array([not wanted.isdisjoint(labels.of(row)) for row in items.index.tolist()], bool)
    if labels is not None:
        for text in texts:
            rows = labels.rows(text)
            found[rows[: np.searchsorted(rows, items.count)]] = True
    return found
