"""Filters against plain Python, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import FilterError, UnknownCatalogue
from serving.items.catalogue import NOW_STEP_S, Catalogue
from serving.items.catalogue_file import read_catalogue, write_catalogue
from serving.items.fields import MAX_FIELDS, Fields, from_time, to_time
from serving.items.filter_parser import MAX_COST, MAX_DEPTH, MAX_LENGTH, MAX_WORDS, PARSER, known, parse_filter
from serving.items.matching import Items, matching
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.types import Rules
from tests.builders import random_codes, random_order
from tests.serving.items.test_rules import ask, blocked_nodes

NOW = 1_800_000_000.0
DAY = 86400.0
Item = dict[str, Any]
Predicate = Callable[[Item], bool]

numbers = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 2.0, 50.0])
strings = st.sampled_from(["A", "B", 'a "quoted" one', "é", "2"])
dates = st.sampled_from(["2027-01-01", "2027-01-15T08:00:00Z", "2027-01-15T09:00:00+01:00"])
values = st.one_of(numbers, strings, dates, st.booleans(), st.lists(strings, min_size=1, max_size=3))
names = st.sampled_from(["price", "brand", "tags", "and", "has a space"])
items = st.dictionaries(names, values, max_size=4)


def written(name: str) -> str:
    return f"`{name}`" if name in ("and", "has a space") else name


def typed(value: Any) -> tuple[str, Any]:
    """A value's type and what is compared, from first principles."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float):
        return "number", value
    if isinstance(value, list):
        return "list", value
    return ("string", value) if to_time(value) is None else ("time", to_time(value))


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, Predicate]:
    name, kind = draw(names), draw(st.sampled_from(["compare", "in", "has", "now"]))
    if kind == "has":
        wanted = draw(st.lists(strings, min_size=1, max_size=2))
        text = json.dumps(wanted) if len(wanted) > 1 else json.dumps(wanted[0])
        return (
            f"{written(name)} has {text}",
            lambda item: isinstance(item.get(name), list) and any(each in item[name] for each in wanted),
        )
    if kind == "now":
        days = draw(st.integers(-40, 40))
        at = NOW + days * DAY
        text = f"{written(name)} >= now {'-' if days < 0 else '+'}{abs(days)}d"
        return text, lambda item: name in item and typed(item[name])[0] == "time" and typed(item[name])[1] >= at
    if kind == "in":
        some = draw(st.lists(st.one_of(numbers, strings, dates, st.booleans()), min_size=1, max_size=4))
        known = [typed(value) for value in some]
        return f"{written(name)} in {json.dumps(some)}", lambda item: name in item and typed(item[name]) in known
    value = draw(st.one_of(numbers, strings, dates, st.booleans()))
    ordered = typed(value)[0] in ("number", "time")
    order = draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="] if ordered else ["==", "!="]))
    compare = {
        "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    }[order]  # fmt: skip

    def is_so(item: Item) -> bool:
        if name not in item or typed(item[name])[0] != typed(value)[0]:
            return False
        return bool(compare(typed(item[name])[1], typed(value)[1]))

    return f"{written(name)}{order} {json.dumps(value)}", is_so


def joined(part: st.SearchStrategy[tuple[str, Predicate]]) -> st.SearchStrategy[tuple[str, Predicate]]:
    pairs = st.tuples(part, part)
    return st.one_of(
        part.map(lambda one: (f"not ({one[0]})", lambda item: not one[1](item))),
        pairs.map(lambda two: (f"({two[0][0]}) and ({two[1][0]})", lambda item: two[0][1](item) and two[1][1](item))),
        pairs.map(lambda two: (f"({two[0][0]})\nor({two[1][0]})", lambda item: two[0][1](item) or two[1][1](item))),
    )


filters = st.recursive(conditions(), joined, max_leaves=6)


def columns(shop: list[Item]) -> Fields:
    made = Fields()
    for row, item in enumerate(shop):
        made.reserve(row + 1)
        made.put(row, {"price": 7.0, "brand": "before"})  # in place of which comes:
        made.put(row, item)
    return made


@settings(max_examples=120, deadline=None)
@given(
    shop=st.lists(items, min_size=1, max_size=8),
    later=st.dictionaries(st.integers(0, 9), items, max_size=4),
    asked=filters,
    parts=st.sampled_from([1, 2, 64]),
    many_changed=st.sampled_from([0, 64]),
    few=st.sampled_from([0, 32]),
    seed=st.integers(0, 9),
)
def test_a_filter_is_true_of_the_items_of_which_python_says_so(
    shop: list[Item],
    later: dict[int, Item],
    asked: tuple[str, Predicate],
    parts: int,
    many_changed: int,
    few: int,
    seed: int,
) -> None:
    """All of them and some; also as they change and others come, by passes, the index of before and a new one."""
    text, predicate = asked
    read = parse_filter(text)
    assert parse_filter(read.text) == read  # one spelling, which means the same
    fields, order = columns(shop), random_order(len(shop), seed)
    fields.arrange(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.value_index.PARTS", parts)
        patch.setattr("serving.items.field_index.MANY_CHANGED", many_changed)
        patch.setattr("serving.items.matching.FEW", few)
        patch.setattr("serving.items.matching.MANY_CODES", few)
        for row, item in [(0, shop[0]), *later.items()]:
            for new in range(len(shop), row + 1):
                shop.append({})
                fields.reserve(new + 1)
                fields.put(new, {})
            shop[row] = item
            fields.put(row, item)
            expected, rows = [predicate(each) for each in shop], np.arange(len(shop))[::-1]
            assert order.by_row(matching(read.expression, Items(fields, len(shop)), NOW)).tolist() == expected
            fields.indexes.wait()
            assert order.by_row(matching(read.expression, Items(fields, len(shop)), NOW)).tolist() == expected
            assert matching(read.expression, Items(fields, len(shop), rows), NOW).tolist() == expected[::-1]


@pytest.mark.parametrize("text, precedence", [
    ("a == 1 or b == 1 and not c == 1", lambda a, b, c: a or (b and not c)),
    ("not a == 1 and b == 1 or c == 1", lambda a, b, c: ((not a) and b) or c),
    ("not (a == 1 or b == 1) and not not c == 1", lambda a, b, c: not (a or b) and c),
], ids=["or, and, not", "not, and, or", "groups"])  # fmt: skip
def test_not_binds_closer_than_and_which_binds_closer_than_or(text: str, precedence: Callable[..., bool]) -> None:
    every = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    fields = columns([dict(zip("abc", map(float, each), strict=True)) for each in every])
    found = matching(parse_filter(text).expression, Items(fields, len(every)), NOW)
    assert found.tolist() == [bool(precedence(*each)) for each in every]


@pytest.mark.parametrize("spellings", [
    ["price<50", " price  <\n50.0 ", "((price < 5e1))", "not not price < 50"],
    ["price in [0]", "price == -0", "price in [-0.0, 0, 0e9]"],
    ['brand in ["B","A"]', 'brand in [ "A", "B", "A" ]', 'brand in ["\\u0041", "B"]', 'brand == "B" or brand == "A"'],
    ['a == 1 or b < 2 or a in [true, 3]', 'a in [1, 3, true] or b < 2', '(a == 3 or a == 1 or a == true) or b < 2'],
    ['a == "2027-01-15"', 'a == "2027-01-15T01:00+01:00"'],
    ["a > now - 1d", "a > now-24h", "`a`>now -86400s"],
], ids=["spaces and numbers", "zeros", "lists", "alternatives", "times", "time spans"])  # fmt: skip
def test_spellings_of_one_filter_are_one(spellings: list[str]) -> None:
    assert len({parse_filter(spelling).text for spelling in spellings}) == 1


@pytest.mark.parametrize("text, position, fault", [
    ("price", 6, "expected ==, !=, <"),
    ("price < ", 9, "expected `now`, a number"),
    ("price < 50 and", 15, "expected (, `not` or a field"),
    ("price < 50 AND brand == 1", 12, "expected `and`, `or` or the end"),
    ("(price < 50", 12, "expected ), `and` or `or`"),
    ("price < 50)", 11, "expected `and`, `or` or the end"),
    ("price < 50 ; x", 12, "expected `and`, `or` or the end"),
    ("brand == 'A'", 10, "expected `now`, a number, a string in double quotes"),
    ('brand == "A', 10, "expected `now`, a number, a string in double quotes"),
    ('brand < "A"', 9, "only numbers and times have an order"),
    ("tags has 3", 10, "expected [ or a string in double quotes"),
    ("added > now - 7", 15, "expected a time span such as 7d"),
    ("added > now - 9999w", 9, "at most 100 years"),
    ("price < 1e999", 9, "too large"),
    ("price < 1" + "0" * 309, 9, "too large"),
    ("price in [1, -" + "9" * 1900 + "]", 14, "too large"),
    ('a == "\\ud800"', 6, "a lone surrogate"),
    (" or ".join(["a < 1"] * (MAX_COST + 1)), 9 * MAX_COST + 1, f"at most {MAX_COST} times"),
    (f"a in {list(range(2 * MAX_COST + 1))}", 1, f"at most {MAX_COST} times"),
    ("not " * MAX_WORDS + "a < 1", 4 * MAX_WORDS + 1, f"at most {MAX_WORDS} words"),
    ("(" * 1000 + "a < 1" + ")" * 1000, MAX_WORDS + 1, f"at most {MAX_WORDS} words"),
    ("not (" * 20 + "a < 1" + ")" * 20, 61, "nest at most 12 groups"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_an_error_points_at_the_character(text: str, position: int, fault: str) -> None:
    with pytest.raises(FilterError) as error:
        parse_filter(text)
    assert error.value.position == position and fault in error.value.fault
    assert str(error.value).startswith(f"At character {position} of the filter: ") and error.value.field == "filter"


def test_the_one_spelling_of_a_filter_may_be_read_and_boosted_too() -> None:
    """It has parentheses that nobody wrote, and is all that is kept of a filter."""
    third = "not a > now - 7d and not b < now + 1h and not c == now - 1s"
    triples = " or ".join([third] * (MAX_COST // 3))
    assert parse_filter(triples).text.count("(") == MAX_COST // 3
    pairs = [f"not (not a{each} > now - 7d and not b < now + 1h)" for each in range(MAX_COST // 2)]
    for text in (triples, " and ".join(pairs)):
        read = parse_filter(text)
        known.clear()
        assert parse_filter(read.text) == read
        assert len(list(PARSER.lex(f"not ({read.text})"))) <= MAX_WORDS and parse_filter(f"not ({read.text})")


spans = st.decimals(0, 3_000_000_000, allow_nan=False, allow_infinity=False)
any_numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**300), 10**300))
moments = st.datetimes(timezones=st.just(UTC)).map(lambda time: json.dumps(time.isoformat()))


@settings(max_examples=300, deadline=None)
@given(
    operand=st.one_of(
        st.builds(lambda sign, span: f"now {sign} {span:f}s", st.sampled_from("+-"), spans),
        st.builds(lambda sign, power: f"now {sign} 0.{'0' * power}1w", st.sampled_from("+-"), st.integers(0, 330)),
        any_numbers.map(json.dumps),
        moments.filter(lambda text: to_time(json.loads(text)) is not None),
    ),
    order=st.sampled_from(["==", "!=", "<", ">="]),
)
def test_the_one_spelling_of_any_number_and_time_means_the_same(operand: str, order: str) -> None:
    read = parse_filter(f"a {order} {operand}")
    known.clear()
    assert parse_filter(read.text) == read


ends = st.one_of(
    st.datetimes(timezones=st.timezones()),
    st.datetimes(min_value=datetime(9999, 12, 30)),
    st.datetimes(max_value=datetime(1, 1, 2)),
)
hours = st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours)))


@settings(max_examples=300, deadline=None)
@given(time=ends, zone=hours)
def test_a_string_is_a_time_if_it_can_be_written_again(time: datetime, zone: timezone) -> None:
    text = time.replace(tzinfo=zone).isoformat()
    seconds, fields = to_time(text), columns([{"at": text}])
    if seconds is None:  # beyond the calendar's ends in UTC, or less than the distance of two numbers from them
        assert fields.of(0) == {"at": text}
        assert min(time - datetime.min, datetime.max - time) < timedelta(hours=24)
        return
    shown = str(fields.of(0)["at"])
    assert to_time(shown) == seconds and parse_filter(f"at == {json.dumps(text)}").text == f'at == "{shown}"'
    assert abs(datetime.fromisoformat(shown) - datetime.fromisoformat(text)) <= timedelta(microseconds=16)


@pytest.mark.parametrize("text, is_time", [
    ("9999-12-31T23:59:59.999999Z", False), ("9999-12-31T23:59:59.99995Z", True), ("9999-12-31T23:59:59Z", True),
    ("9999-12-31T23:59:59-01:00", False), ("9999-12-31T23:59:59+01:00", True),
    ("0001-01-01T00:00:00+05:00", False), ("0001-01-01T00:00:00-05:00", True), ("0001-01-01", True),
])  # fmt: skip
def test_times_at_the_ends_of_the_calendar(text: str, is_time: bool) -> None:
    assert (to_time(text) is not None) == is_time
    if not is_time:
        with pytest.raises(FilterError, match="only numbers and times have an order"):
            parse_filter(f'released < "{text}"')


def test_a_time_that_an_earlier_version_has_stored_beyond_the_calendar_can_be_read() -> None:
    assert from_time(253402300800.0) == "9999-12-31T23:59:59.999969Z" and from_time(-1e12) == "0001-01-01T00:00:00Z"


WORDS = [
    "a",
    "`b c`",
    "==",
    "<",
    "in",
    "[",
    "]",
    ",",
    "has",
    "(",
    ")",
    "and",
    "or",
    "not",
    "now",
    "-",
    "7d",
    "1.5",
    '"x"',
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.text(max_size=30)))
def test_whatever_is_no_filter_is_an_error_with_a_place(text: str) -> None:
    try:
        assert parse_filter(parse_filter(text).text)
    except FilterError as error:
        assert 1 <= error.position <= len(text) + 1


def shop(count: int, seed: int) -> Catalogue:
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(
        item_ids=[f"i{row}" for row in range(count)],
        tokens=random_codes(count, (5, 4, 6), seed).astype(np.int32),
        titles=[None] * count,
        categories=[[name for name in "abc" if rng.random() < 0.4] for _ in range(count)],
        popularity=rng.permutation(count).astype(float),
        subsets={"some": np.arange(0, count, 2)},
    )
    for row in range(count):
        catalogue.fields.put(row, {"price": float(rng.integers(10)), "categories": catalogue.categories[row]})
    return catalogue


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(4, 60), slots=st.integers(0, 3), is_arranged=st.booleans())
def test_a_filter_blocks_what_it_does_not_permit(seed: int, count: int, slots: int, is_arranged: bool) -> None:
    """With other rules or without, and with room for hardly any prepared set."""
    catalogue = shop(count, seed)
    trie = build_trie(catalogue.tokens)
    if is_arranged:
        catalogue.fields.arrange(trie.order)
    book = RuleBook(trie, catalogue.sets, set_bytes=slots * 2 * trie.nodes)
    texts = [("price < 5",), ('categories has "a"', "price != 3"), ("price > 100",), ("price >= 0",)]
    some = [
        Rules(filters=texts[0]),
        Rules(filters=texts[1], catalogue="some", exclude=(1, 2)),
        Rules(filters=texts[2]),
        Rules(filters=texts[3], exclude=(0, 3)),
        Rules(filters=texts[0], allow=(0, 1, 2, 3)),
        Rules(deny=(3,)),
    ]
    for rules in (some, some[::-1]):
        nodes, by_item = ask(book, trie, rules)
        for rule, of_nodes, of_items in zip(rules, nodes, by_item, strict=True):
            permitted = catalogue.permitted(rule)
            np.testing.assert_array_equal(of_nodes, blocked_nodes(trie, permitted))
            np.testing.assert_array_equal(of_items, ~permitted)
            assert catalogue.permitted_indices(range(count), rule) == np.flatnonzero(permitted).tolist()
    cheap = [row for row in range(count) if catalogue.fields.of(row)["price"] < 5]
    assert np.flatnonzero(catalogue.permitted(some[0])).tolist() == cheap


def test_a_named_filter_stands_for_its_items_also_as_they_and_the_time_change() -> None:
    catalogue = shop(20, 0)
    catalogue.name_subset("new", "added > now - 1d")
    catalogue.name_subset("cheap", "price < 3")
    catalogue.describe(3, None, [], {"added": "2027-01-15T08:00:00Z"})  # which is NOW
    assert catalogue.subset_names == ["cheap", "new", "some"]

    def members(name: str, now: float = NOW, **more: Any) -> list[int]:
        rules = catalogue.resolve(Rules(catalogue=name, **more), now)
        return np.flatnonzero(catalogue.members(rules)).tolist()

    assert members("new") == members("new", NOW + DAY - NOW_STEP_S) == [3]
    assert members("new", NOW + DAY) == [] == members("new", filters=("price < 100",))
    assert 5 not in members("cheap") or catalogue.fields.of(5)["price"] < 3
    catalogue.describe(5, None, [], {"price": 2.5})
    assert 5 in members("cheap")
    catalogue.describe(5, None, [], {})
    assert 5 not in members("cheap")
    first, later = (catalogue.resolve(Rules(catalogue="new"), now) for now in (NOW, NOW + NOW_STEP_S / 2))
    assert first == later and first.catalogue is None  # one prepared set for both
    assert catalogue.resolve(Rules(filters=("a > now",)), NOW + NOW_STEP_S).now == NOW + NOW_STEP_S
    assert catalogue.resolve(Rules(filters=("a > 1",)), NOW).now == 0
    catalogue.name_subset("new", [1, 2])
    assert members("new") == [1, 2] and catalogue.name_subset("new", "price < 3") == []
    assert catalogue.name_subset("new", [2, 3]) == [1, 3]  # what is prepared for the list of before has to follow
    with pytest.raises(UnknownCatalogue):
        catalogue.resolve(replace(first, catalogue="never"), NOW)


def test_all_examples_of_the_page_about_filters_can_be_read() -> None:
    page = (Path(__file__).parents[3] / "docs/FILTERS.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```filter\n(.*?)```", page, re.DOTALL)
    examples = [*block.splitlines(), *re.findall(r"\| `([^`]+)` \|$", page, re.MULTILINE)]
    assert len(examples) > 15 and all(parse_filter(example) for example in examples)
    bounds = f"{MAX_LENGTH:,} characters, {MAX_WORDS} words and signs, {MAX_DEPTH} nested groups"
    assert f"at most {bounds} and {MAX_COST} comparisons" in page and f"a list has at most {2 * MAX_COST}." in page
    assert f"at most {MAX_FIELDS} different fields" in page


@settings(max_examples=50, deadline=None)
@given(shop=st.lists(items, min_size=1, max_size=6))
def test_fields_are_read_back_from_a_bundle(shop: list[Item], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "catalogue.parquet"
    count = len(shop)
    made = Catalogue(
        [str(row) for row in range(count)], np.arange(count, dtype=np.int32)[:, None], [None] * count,
        [["x"][row % 2 :] for row in range(count)], np.ones(count), fields=columns(shop),
    )  # fmt: skip
    made.fields.arrange(random_order(count))
    write_catalogue(path, made, path.with_suffix(".arrow"))
    again = Catalogue(made.item_ids, made.tokens, made.titles, made.categories, made.popularity, fields=made.fields)
    for catalogue in (made, again):
        permitted = catalogue.permitted(Rules(categories=("x",), filters=('categories has "x"',)))
        assert permitted.tolist() == [row % 2 == 0 for row in range(count)]
    opened = read_catalogue(path, 1, {})
    assert [opened.fields.of(row) for row in range(count)] == [made.fields.of(row) for row in range(count)]
    rows = opened.add("new", [count], None, [], {"price": 1.0, "brand": "a new one"})
    assert opened.fields.of(rows) == {"brand": "a new one", "price": 1}
