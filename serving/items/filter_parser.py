"""Reads filters, the language of docs/FILTERS.md, and says at which character one is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken

from serving.errors import FilterError
from serving.ids import LONE_SURROGATE, is_unicode
from serving.items.fields import to_time
from serving.items.filters import (
    Compare,
    Condition,
    Differs,
    Equals,
    Expression,
    Has,
    Joined,
    Moment,
    Not,
    Value,
    conditions,
    distinct,
    to_text,
    values_of,
)

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 12  # groups of `and`, `or` and `not` in each other
MAX_COST = 8  # comparisons: one for each condition, and of lists one for two values
MAX_WORDS = 80  # and signs; more than the one spelling of any filter within the other bounds has
MAX_SPAN = 100 * 365 * 86400.0  # seconds
KNOWN = 2048  # spellings of filters that need not be read again
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

GRAMMAR = r"""
?start: any
?any: all ("or" all)*
?all: negated ("and" negated)*
?negated: NOT* "(" any ")"
    | NOT* condition
?condition: field ORDER value         -> compare
    | field "in" "[" _values "]"      -> one_of
    | field "has" STRING              -> has
    | field "has" "[" _strings "]"    -> has
_values: value ("," value)*
_strings: STRING ("," STRING)*
value: NUMBER
    | STRING
    | TRUE
    | FALSE
    | NOW (SIGN DURATION)?
field: NAME
    | QUOTED_NAME
ORDER: "==" | "!=" | "<=" | ">=" | "<" | ">"
NOT: "not"
TRUE: "true"
FALSE: "false"
NOW: "now"
SIGN: "+" | "-"
NAME: /[A-Za-z_][A-Za-z0-9_]*/
QUOTED_NAME: /`[^`]+`/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
DURATION: /[0-9]+(\.[0-9]+)?[smhdw]\b/
STRING: /"([^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/
%ignore /[ \t\r\n]+/
"""
PARSER = Lark(GRAMMAR, parser="lalr", maybe_placeholders=False)
NAMES = {  # of what the parser may expect, in the words of a message
    "ORDER": "==, !=, <, <=, > or >=",
    "AND": "`and`",
    "OR": "`or`",
    "NOT": "`not`",
    "IN": "`in`",
    "HAS": "`has`",
    "NOW": "`now`",
    "NAME": "a field",
    "QUOTED_NAME": "",
    "NUMBER": "a number",
    "STRING": "a string in double quotes",
    "SIGN": "+, -",
    "DURATION": "a time span such as 7d",
    "LPAR": "(",
    "RPAR": ")",
    "LSQB": "[",
    "RSQB": "]",
    "COMMA": "a comma",
    "$END": "the end",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """text: the same for filters that differ in nothing but their spelling. is_relative: whether it names `now`."""

    text: str
    expression: Expression
    is_relative: bool


known: dict[str, Filter] = {}  # by every spelling: the one that stands for all is read as often as any


def parse_filter(text: str) -> Filter:
    """Raises FilterError."""
    found = known.get(text)
    if found is None:
        expression = _Reader().expression(_tree(text))
        values = (value for condition in conditions(expression) for value in values_of(condition))
        is_relative = any(isinstance(value, Moment) and value.from_now for value in values)
        found = Filter(to_text(expression), expression, is_relative)
        if len(known) >= KNOWN:
            known.clear()
        known[text] = known[found.text] = found
    return found


def _tree(text: str) -> Tree[Token]:
    parser = PARSER.parse_interactive(text)
    try:
        for count, token in enumerate(parser.iter_parse()):
            if count == MAX_WORDS:
                raise FilterError(f"use at most {MAX_WORDS} words and signs", 1 + (token.start_pos or 0))
        tree: Tree[Token] = parser.feed_eof()  # type: ignore[no-untyped-call]
    except UnexpectedInput as error:
        raise _unexpected(text, error) from None
    return tree


class _Reader:
    """Makes an expression of a tree, within the bounds."""

    def __init__(self) -> None:
        self._cost = 0

    def expression(self, tree: Tree[Token], depth: int = MAX_DEPTH) -> Expression:
        if tree.data in ("any", "all", "negated") and depth == 0:
            raise FilterError(f"nest at most {MAX_DEPTH} groups", _position(tree))
        match tree.data:
            case "any" | "all":
                parts = tuple(self.expression(child, depth - 1) for child in _trees(tree))
                return _any(parts) if tree.data == "any" else Joined("and", parts)
            case "negated":
                part = self.expression(_trees(tree)[0], depth - 1)
                if len(tree.children) % 2:  # `not` an even number of times, and the part
                    return part
                return part.part if isinstance(part, Not) else Not(part)
            case _:
                condition = _condition(tree)
                self._cost += _cost(condition)
                if self._cost > MAX_COST:
                    raise FilterError(
                        f"compare at most {MAX_COST} times; two values of a list count as one", _position(tree)
                    )
                return condition


def _any(parts: Sequence[Expression]) -> Expression:
    """Values that a field may have are one list, for items are compared with a list at once."""
    values: dict[str, list[Value]] = {}
    others = list[Expression]()
    for part in parts:
        if isinstance(part, Equals):
            values.setdefault(part.field, []).extend(part.values)
        else:
            others.append(part)
    lists = [Equals(field, distinct(each)) for field, each in values.items()]
    return Joined("or", (*lists, *others)) if len(lists) + len(others) > 1 else lists[0]


def _condition(tree: Tree[Token]) -> Condition:
    field, *operands = tree.children
    assert isinstance(field, Tree)
    name = str(field.children[0]).strip("`")
    if tree.data == "has":
        return Has(name, distinct(str(json.loads(str(text))) for text in operands))
    if tree.data == "one_of":
        return Equals(name, distinct(_value(operand) for operand in operands if isinstance(operand, Tree)))
    order, operand = operands
    assert isinstance(operand, Tree)
    value = _value(operand)
    if order == "==":
        return Equals(name, (value,))
    if order == "!=":
        return Differs(name, value)
    if isinstance(value, str | bool):
        raise FilterError("only numbers and times have an order", _position(operand))
    return Compare(name, str(order), value)


def _value(tree: Tree[Token]) -> Value:
    first, *rest = (token for token in tree.children if isinstance(token, Token))
    if first.type == "NOW":
        seconds = SECONDS[rest[1][-1]] * float(rest[1][:-1]) if rest else 0.0
        if seconds > MAX_SPAN:
            raise FilterError("name a time span of at most 100 years", _position(tree))
        return Moment(-seconds if rest and rest[0] == "-" else seconds, from_now=True)
    if first.type == "NUMBER":
        number = float(first)  # of the text: a whole number of 309 digits is no float, and raises an error
        if not math.isfinite(number):
            raise FilterError("the number is too large", _position(tree))
        return number + 0.0  # -0 is 0
    value: bool | str = json.loads(str(first))
    if isinstance(value, bool):
        return value
    if not is_unicode(value):
        raise FilterError(f"the string {LONE_SURROGATE}", _position(tree))
    time = to_time(value)
    return value if time is None else Moment(time)


def _cost(condition: Condition) -> int:
    """How many comparisons it takes as long as."""
    return -(-len(values_of(condition)) // 2)


def _trees(tree: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree)]


def _position(tree: Tree[Token]) -> int:
    """At which character a tree begins."""
    token = next(tree.scan_values(lambda token: isinstance(token, Token)))
    return 1 + (token.start_pos or 0)


def _unexpected(text: str, error: UnexpectedInput) -> FilterError:
    """An error that names what may stand there instead."""
    at_end = isinstance(error, UnexpectedToken) and error.token.type == "$END"
    index = len(text) if at_end else error.pos_in_stream or 0
    until_there = PARSER.parse_interactive(text[:index])
    until_there.exhaust_lexer()
    accepted = until_there.accepts()  # type: ignore[no-untyped-call]
    *others, last = sorted({NAMES.get(name, name.lower()) for name in accepted} - {""})
    return FilterError(f"expected {', '.join(others)}{' or ' if others else ''}{last}", 1 + index)
