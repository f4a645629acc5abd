"""Conditions on the fields of items: what they are, and their text in one form.

`serving/items/filter_parser.py` reads them, `serving/items/matching.py` evaluates them; docs/FILTERS.md describes the
language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeVar

from serving.items.fields import from_time

Word = Literal["and", "or"]
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
    span = f"{Decimal(repr(abs(value.seconds))):f}s"  # without an exponent: a span has none
    return f"now {'-' if value.seconds < 0 else '+'} {span}" if value.seconds else "now"
