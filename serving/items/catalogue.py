"""The items: ids, tokens, titles, categories, popularity and named subsets; which of them a request's rules permit.

Items may be added, changed, and taken off the list while others read, on one thread. A row is never given to another
item: histories, cached states and searches under way go on to mean the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain, islice

import numpy as np

from serving.errors import BundleError, RequestError, UnknownCatalogue
from serving.items.columns import Column
from serving.items.fields import NO_FIELDS, Fields, Value
from serving.items.filter_parser import parse_filter
from serving.items.labels import Labels
from serving.items.matching import Items, matching
from serving.items.order import ItemSets, Order
from serving.items.row_index import RowIndex
from serving.items.titles import TitleIndex, build_title_index
from serving.types import Boost, Rules

AT_ONCE = 256  # rows whose rules are looked at together
WALKED = 2048  # of the most popular items are looked at one by one, in about a millisecond
NO_CATEGORY = "No item is in one of these categories; choose some that the model lists."
NOW_STEP_S = 60.0  # what `now` stands for in a filter moves on so often, and sets of items that depend on it with it


@dataclass(slots=True)
class Catalogue:
    """One entry per item; its index is the item's row everywhere inside serving.

    tokens: (I, M) int32 vocabulary ids. popularity: (I,) float64, times seen in training. subsets: name -> rows,
    made distinct and ascending. filters: name -> filter, of the named subsets that have whatever items pass it.
    fields: what else is known of items, the categories included, for filters. listed: (I,) bool, which items may be
    recommended.
    Raises BundleError if two items have the same id.
    """

    item_ids: Column[str]
    tokens: np.ndarray
    titles: Column[str | None]
    categories: Column[list[str]]
    popularity: np.ndarray
    subsets: dict[str, np.ndarray] = field(default_factory=dict)
    title_index: TitleIndex | None = None  # of the titles as they were, most popular first; see `index_titles`
    fields: Fields = field(default_factory=Fields)
    filters: dict[str, str] = field(default_factory=dict)
    row_index: RowIndex | None = None  # of a mapped catalogue; None: ids are looked up in a dict
    listed: np.ndarray = field(init=False)
    _rows: dict[str, int] | RowIndex = field(init=False)
    _labels: Labels = field(init=False)  # the categories
    _settled_at: dict[int, float] = field(init=False, default_factory=dict)  # of rows that have changed
    _by_popularity: np.ndarray = field(init=False)
    _room: tuple[np.ndarray, ...] = field(init=False)  # tokens, popularity and listed, with rows to come behind them
    _removed: set[int] = field(init=False, default_factory=set)  # rows
    _in_category: dict[str, int] = field(init=False)  # how many items each has, the removed ones not counted
    _retitled: dict[int, None] = field(init=False, default_factory=dict)  # rows whose title is not in it, oldest first

    def __post_init__(self) -> None:
        self._rows = _rows_by_id(self.item_ids, self.row_index)
        for name, rows in self.subsets.items():
            self.subsets[name] = np.unique(rows)
        self._labels = self.fields.lists["categories"] = Labels(self.categories)
        self._labels.arrange(self.fields.order)
        self._in_category = {name: len(self._labels.positions(name)) for name in self._labels.names}
        self.fields.reserve(len(self.item_ids))
        self._by_popularity = np.argsort(-self.popularity, kind="stable").astype(np.int32)
        self.listed = np.ones(len(self.item_ids), dtype=bool)
        self._room = (self.tokens, self.popularity, self.listed)

    @property
    def order(self) -> Order:
        return self.fields.order

    @property
    def sets(self) -> ItemSets:
        """What rules name, for a `RuleBook`."""
        return ItemSets(self.members, self.order)

    def __len__(self) -> int:
        return len(self.item_ids)

    def row(self, item_id: str) -> int | None:
        return self._rows.get(item_id)

    def rows(self, item_ids: Sequence[str]) -> list[int | None]:
        return list(map(self._rows.get, item_ids))

    def present_rows(self, item_ids: Sequence[str]) -> list[int | None]:
        """`rows`, but none for an item that was removed, which histories alone still know."""
        rows = self.rows(item_ids)
        return [None if row in self._removed else row for row in rows] if self._removed else rows

    @property
    def category_names(self) -> frozenset[str]:
        """All categories that items have, the removed ones left aside."""
        return frozenset(self._in_category)

    @property
    def subset_names(self) -> list[str]:
        return sorted({*self.subsets, *self.filters})

    def resolve(self, rules: Rules, now: float) -> Rules:
        """Rules in which a filter stands in for a named subset that has one, in one spelling, with the time that `now`
        stands for in them. now: seconds since 1970. Raises FilterError, UnknownCatalogue and RequestError.
        """
        self.check_names(rules)
        if any(name not in self._in_category for name in rules.categories):
            raise RequestError(NO_CATEGORY, "categories")
        texts, catalogue = rules.filters, rules.catalogue
        if catalogue is not None and catalogue in self.filters:
            texts, catalogue = (*texts, self.filters[catalogue]), None
        if not texts:
            return rules
        filters = {parse_filter(text) for text in texts}
        moment = now // NOW_STEP_S * NOW_STEP_S if any(each.is_relative for each in filters) else 0.0
        return replace(rules, filters=tuple(sorted(each.text for each in filters)), catalogue=catalogue, now=moment)

    def boost(self, text: str, factor: float, now: float) -> Boost:
        """Multiplies what the items that pass a filter are worth. Raises FilterError."""
        text = parse_filter(text).text
        rules = self.resolve(Rules(filters=(text if factor >= 1 else f"not ({text})",)), now)
        return Boost(rules, math.log(factor))

    def log_factors(self, boosts: Sequence[Boost], rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What boosts add to the log scores of items. Shape: (n,) catalogue rows -> (n,) float64."""
        items = Items(self.fields, len(rows), np.asarray(rows, np.int64))
        factors = np.zeros(len(rows))
        for boost in boosts:
            factors += np.where(self._passes(boost.rules, items) == (boost.log_factor > 0), boost.log_factor, 0.0)
        return factors

    def check_names(self, rules: Rules) -> None:
        """Raises UnknownCatalogue or RequestError for a named subset or a category that never existed: one may lose its
        last item while a search for it is under way."""
        if rules.catalogue is not None and rules.catalogue not in self.subsets and rules.catalogue not in self.filters:
            raise UnknownCatalogue("No catalogue of that name exists; choose one that the model lists.", "catalogue")
        if any(name not in self._labels.names for name in rules.categories):
            raise RequestError(NO_CATEGORY, "categories")

    def is_new(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which items nobody had when the model was trained: those added since, and those without a training event.

        Shape: (n,) -> (n,) bool.
        """
        new: np.ndarray = self.popularity[np.asarray(rows, np.int64)] == 0
        return new

    @property
    def listed_count(self) -> int:
        """How many items may be recommended."""
        return int(np.count_nonzero(self.listed))

    def listed_rows(self) -> np.ndarray:
        """The rows of all items that may be recommended, ascending. Shape: (n,) int64.

        Of a copy: numpy counts them and then writes them down. What another thread changes in between would leave rows
        at the end that nobody wrote.
        """
        return np.flatnonzero(self.listed.copy())

    def members(self, rules: Rules) -> np.ndarray:
        """Which items are listed and among a request's named subset, categories and filters, and new if it wants those.

        Shape: (I,) bool, by position in `order`. Raises UnknownCatalogue, RequestError.
        """
        self.check_names(rules)
        lists = [] if rules.catalogue is None else [self.order.positions_of(self.subsets[rules.catalogue])]
        if rules.categories:
            lists.append(np.concatenate([self._labels.positions(name) for name in rules.categories]))
        count = len(self)  # after these, which name no item that is yet to come
        is_member = self._passes(rules, Items(self.fields, count)) if rules.filters else np.ones(count, bool)
        for positions in lists:
            is_member &= _only(positions, count)
        is_listed = self.listed[:count].copy()
        if not is_listed.all():
            is_member[self.order.positions_of(np.flatnonzero(~is_listed))] = False
        if rules.new_only:
            is_member[is_member] = self.is_new(self.order.rows_at(np.flatnonzero(is_member)))
        return is_member

    def _passes(self, rules: Rules, items: Items) -> np.ndarray:
        """Which of `items`, in their order, pass all filters, of which there is at least one. Shape: (count,) bool."""
        found = (matching(parse_filter(text).expression, items, rules.now) for text in rules.filters)
        return reduce(np.logical_and, found)

    def is_member(self, row: int, rules: Rules) -> bool:
        """Whether a row is among the `members` of existing names."""
        return self._is_named(row, rules) and (
            not rules.filters or bool(self._passes(rules, Items(self.fields, 1, np.array([row])))[0])
        )

    def _is_named(self, row: int, rules: Rules) -> bool:
        """`is_member`, the filters apart."""
        return (
            bool(self.listed[row])
            and (not rules.new_only or bool(self.is_new([row])[0]))
            and (not rules.categories or any(name in rules.categories for name in self.categories[row]))
            and (rules.catalogue is None or _holds(self.subsets[rules.catalogue], row))
        )

    def fields_of(self, row: int) -> dict[str, Value]:
        """An item's fields, the categories apart."""
        fields = self.fields.of(row)
        fields.pop("categories", None)
        return fields

    def permitted(self, rules: Rules) -> np.ndarray:
        """Which items pass every rule that is set. Shape: (I,) bool. Raises UnknownCatalogue, RequestError.

        This is the definition, and passes over the whole catalogue; `serving.items.rules` gives the search the same
        answer for the cost of a request's lists.
        """
        allowed = self.order.by_row(self.members(rules))
        if rules.allow is not None:
            allowed &= _only(np.asarray(rules.allow, dtype=np.int64), len(allowed))
        allowed[np.asarray(rules.exclude + rules.deny, dtype=np.int64)] = False
        return allowed

    def permitted_indices(self, items: Sequence[int], rules: Rules) -> list[int]:
        """Indices into `items` of the rows that exist, pass every rule that is set and appear for the first time.

        `permitted` for a few rows, without a pass over the catalogue. Raises KeyError for an unknown subset.
        """
        allowed = None if rules.allow is None else set(rules.allow)
        left_out = {*rules.exclude, *rules.deny}  # and what came before
        indices, count = [], len(self)
        for index, row in enumerate(items):
            if row in left_out or not 0 <= row < count:
                continue
            left_out.add(row)
            if (allowed is None or row in allowed) and self._is_named(row, rules):
                indices.append(index)
        if not rules.filters:
            return indices
        passes = self._passes(rules, Items(self.fields, len(indices), np.array([items[i] for i in indices], np.int64)))
        return [index for index, passed in zip(indices, passes.tolist(), strict=True) if passed]

    def first_permitted(self, rows: Sequence[int], rules: Rules, k: int) -> list[int]:
        """The first k of the `permitted_indices` of distinct rows, looking at hardly more rows than that takes."""
        indices: list[int] = []
        for begin in range(0, len(rows), AT_ONCE):
            if len(indices) >= k:
                break
            found = self.permitted_indices(rows[begin : begin + AT_ONCE], rules)
            indices += [begin + index for index in found]
        return indices[:k]

    def popular(self, k: int, rules: Rules, boosts: Sequence[Boost] = ()) -> list[int]:
        """The k most popular permitted items, most popular first, as boosts multiply their popularity; of equally
        popular ones the first row. Raises UnknownCatalogue, RequestError.

        With boosts, and where the most popular items do not tell, this passes over the whole catalogue.
        """
        if not boosts and (found := self.popular_at_once(k, rules)) is not None:
            return found
        rows = np.flatnonzero(self.permitted(rules))
        worth = self.popularity[rows]
        if boosts:
            worth = worth * np.exp(self.log_factors(boosts, rows))
        best: list[int] = rows[_largest(worth, k)].tolist()
        return best

    def popular_at_once(self, k: int, rules: Rules) -> list[int] | None:
        """`popular` without boosts, as far as the WALKED most popular items tell. None: they do not."""
        self.check_names(rules)
        first = self._by_popularity[:WALKED].tolist()
        indices = self.first_permitted(first, rules, k)
        return [first[index] for index in indices] if len(indices) == k or len(first) == len(self) else None

    def index_titles(self) -> None:
        """Builds what `find_titles` reads, so that the first search does not pay for it."""
        if self.title_index is None:
            self.title_index = build_title_index(_folded(self.titles[row]) for row in self._by_popularity.tolist())

    def find_titles(self, query: str, limit: int) -> list[int]:
        """Rows whose title contains every word of the query, most popular first. Reads titles that may match only."""
        self.index_titles()
        assert self.title_index is not None
        words, retitled = query.casefold().split(), list(self._retitled)
        ranks = self.title_index.candidates(words)
        rows = self._by_popularity if ranks is None else self._by_popularity[ranks]
        known = (row for row in map(int, rows) if row not in self._retitled)
        matches = (row for row in chain(known, retitled) if self._matches(row, words))
        return list(islice(matches, limit))

    def _matches(self, row: int, words: Sequence[str]) -> bool:
        title = _folded(self.titles[row])
        return bool(self.listed[row]) and all(word in title for word in words)

    # Changes

    def add(
        self,
        item_id: str,
        tokens: Sequence[int],
        title: str | None,
        categories: Sequence[str],
        fields: Mapping[str, Value] = NO_FIELDS,
    ) -> int:
        """Appends an item that is not there yet, and lists it. Returns its row."""
        row = len(self.item_ids)
        if row == len(self._room[0]):
            self._room = tuple(np.resize(array, (2 * row, *array.shape[1:])) for array in self._room)
        for array, value in zip(self._room, (tokens, 0.0, True), strict=True):
            array[row] = value
        self.titles.append(None)
        self.categories.append([])
        self.fields.reserve(row + 1)
        self.tokens, self.popularity, self.listed = (array[: row + 1] for array in self._room)
        self.item_ids.append(item_id)
        self.describe(row, title, categories, fields)
        self._rows[item_id] = row  # last: from here on it is found
        return row

    def list_item(self, row: int, is_listed: bool) -> None:
        """From now on an item may be recommended, or may not."""
        self._settled_at[row] = math.inf
        self.listed[row] = is_listed

    def mark_removed(self, row: int, is_removed: bool) -> None:
        """From now on an item is in the catalogue, or only in histories. Whether it may be recommended is apart."""
        if is_removed == (row in self._removed):
            return
        (self._removed.add if is_removed else self._removed.remove)(row)
        self._count_categories(self.categories[row], -1 if is_removed else 1)

    def _count_categories(self, names: Iterable[str], change: int) -> None:
        for name in set(names):
            count = self._in_category.get(name, 0) + change
            if count:
                self._in_category[name] = count
            else:
                del self._in_category[name]

    def settle(self, rows: Iterable[int]) -> None:
        """Searches that begin from now on know what has changed of these rows."""
        self._settled_at.update(dict.fromkeys(rows, time.monotonic()))

    def has_changed(self, row: int, since: float) -> bool:
        """Whether a search that began at `since` (monotonic seconds) may not know what has changed of a row."""
        return self._settled_at.get(row, -math.inf) > since

    def describe(
        self, row: int, title: str | None, categories: Sequence[str], fields: Mapping[str, Value] = NO_FIELDS
    ) -> None:
        """Changes an item's title, categories and fields, and with them what filters take it."""
        self._settled_at[row] = math.inf
        if title != self.titles[row]:
            self._retitled[row] = None
        self.titles[row] = title
        if row not in self._removed:
            self._count_categories(categories, 1)
            self._count_categories(self.categories[row], -1)
        self.fields.put(row, {**fields, "categories": categories})

    def name_subset(self, name: str, subset: Sequence[int] | str) -> list[int]:
        """Gives a named subset these rows, or those that pass a filter, now and as items change.

        Returns the rows that an earlier list of this name had and this one has not, or the other way round."""
        if isinstance(subset, str):
            self.filters[name] = subset  # takes precedence of a list, with which a later one is compared all the same
            return []
        earlier = self.subsets.get(name)
        self.subsets[name] = np.unique(np.array(subset, np.int64))
        self.filters.pop(name, None)
        if earlier is None:
            return []
        changed: list[int] = np.setxor1d(earlier, self.subsets[name]).tolist()
        self._settled_at.update(dict.fromkeys(changed, math.inf))
        return changed


def _only(index: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[index] = True
    return mask


def _rows_by_id(item_ids: Column[str], index: RowIndex | None) -> dict[str, int] | RowIndex:
    rows = index or {item_id: row for row, item_id in enumerate(item_ids)}
    if rows.has_doubles() if isinstance(rows, RowIndex) else len(rows) < len(item_ids):
        raise BundleError("Two items of the catalogue share one id; remove the duplicate and export the bundle again.")
    return rows


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest values are, the largest first, and of equal ones the first: as a stable sort has them, for
    the cost of a selection. Shape: (n,) -> (min(k, n),) int64."""
    if not 0 < k < len(values):
        return np.argsort(-values, kind="stable")[:k]
    least = np.partition(values, -k)[-k]
    larger = np.flatnonzero(values > least)
    larger = larger[np.argsort(-values[larger], kind="stable")]
    return np.concatenate([larger, np.flatnonzero(values == least)[: k - len(larger)]])


def _holds(ascending: np.ndarray, row: int) -> bool:
    index = int(np.searchsorted(ascending, row))
    return index < len(ascending) and bool(ascending[index] == row)


def _folded(title: str | None) -> str:
    return (title or "").casefold()
