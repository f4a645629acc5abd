"""What filters and boosts cost, new and seen before, over catalogues of a million items.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.filters

All times are milliseconds of one core, medians of `--rounds` filters. `read`: from text to expression. `new`: until a
search can begin, with a filter that nobody has sent before: read, evaluated over all items and prepared. `first`: the
same, while none of its fields is indexed; `index`: what indexing them takes then, on a thread of its own, `--builds`
times. `changed`: as `new`, after a hundred items have changed. `seen`: of one that somebody has sent. `none` stands
for a request without any filter, which excludes its history as all others do. Sets replace others, as they do in a
service that has run for a while; those of `unused memory` come first, and write to memory that nothing has used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.constraint import sizes
from benchmarks.engine.constraint_contenders import clustered_codes
from serving.items.catalogue import Catalogue
from serving.items.field_index import Indexes
from serving.items.fields import Fields, Strings
from serving.items.filter_parser import MAX_COST, known, parse_filter
from serving.items.labels import Labels
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.items.value_index import PARTS
from serving.types import Boost, Rules

SEED = 0
BRANDS, SIZES, SHADES, HISTORY, CHANGED = 1000, 20, PARTS + 2, 20, 100
LONGEST = 2 * MAX_COST  # list
SOME_SIZES = ", ".join(f'"s{each}"' for each in range(LONGEST - 1))
SOME_SHADES = ", ".join(f'"{2 * each}"' for each in range(LONGEST - 1))
DAY, NOW = 86400.0, 1.8e9
COLUMNS = ["items", "filter", "share", "read_ms", "first_ms", "index_ms", "new_ms", "changed_ms", "seen_ms"]
FILTERS = {  # by the name of a row; {n} makes each round's another one
    "one brand": 'brand == "b{n}"',
    "a fifth, by price": "price < 20.{n}",
    "four fifths, by price": "price < 80.{n}",
    "three fields": 'price < 50.{n} and brand in ["b1", "b2", "b3", "b4"] and not sizes has "s1"',
    "the last week": "added > now - 7.{n}d",
    f"{LONGEST} prices": f"price in [{', '.join(f'{each}.{{n}}' for each in range(LONGEST))}]",
    f"{LONGEST} shades": f'shade in [{SOME_SHADES}, "new {{n}}"]',
    f"{LONGEST} tags": f'tags has [{SOME_SHADES}, "new {{n}}"]',
    f"{LONGEST} sizes": f'sizes has [{SOME_SIZES}, "new {{n}}"]',
    f"{MAX_COST} times": " and ".join(
        f"not (not time{each} > now - {290 + each}.{{n}}d and not time{each + 1} > now - {291 + each}.{{n}}d)"
        for each in range(0, MAX_COST, 2)
    ),
}

Row = dict[str, Any]


def main() -> None:
    parser = argument_parser("benchmarks.engine.filters", __doc__)
    parser.add_argument("--items", type=sizes, default="1e5,1e6", help="catalogue sizes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="filters of every kind (%(default)s)")
    parser.add_argument("--builds", type=int, default=9, help="times that fields are indexed (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a small catalogue and few rounds")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/filters.json")
    options = parser.parse_args()
    if options.smoke:
        options.items, options.rounds, options.builds = [3000], 3, 2
    run, rows = Run(parser, options), list[Row]()
    for items in options.items:
        rows += measure(items, options.rounds, options.builds)
        print(table(rows[-len(FILTERS) - 3 :], COLUMNS), flush=True)
    run.record(options.out, [SEED], rows)


def catalogue_of(items: int) -> Catalogue:
    """Prices of 0 to 100, brands, ages of up to a year, one or two sizes, and a shade that is a tag as well."""
    rng = np.random.default_rng(SEED)
    fields = Fields()
    fields.reserve(items)
    fields.numbers["price"] = rng.random(items) * 100
    fields.times["added"] = NOW - rng.random(items) * 365 * DAY
    fields.strings["brand"] = Strings(
        rng.integers(0, BRANDS, items).astype(np.int32), [f"b{number}" for number in range(BRANDS)]
    )
    fields.lists["sizes"] = Labels(
        [[f"s{each}" for each in some] for some in rng.integers(0, SIZES, (items, 2)).tolist()]
    )
    shades = rng.integers(0, SHADES, items)
    fields.strings["shade"] = Strings(shades.astype(np.int32), [str(number) for number in range(SHADES)])
    fields.lists["tags"] = Labels([[str(shade)] for shade in shades.tolist()])
    for number in range(MAX_COST):
        fields.times[f"time{number}"] = NOW - rng.random(items) * 365 * DAY
    return Catalogue(
        [str(row) for row in range(items)], clustered_codes(items, SEED), [None] * items, [[]] * items, np.ones(items),
        fields=fields,
    )  # fmt: skip


def measure(items: int, rounds: int, builds: int) -> Iterator[Row]:
    catalogue = catalogue_of(items)
    trie = build_trie(catalogue.tokens)
    catalogue.fields.arrange(trie.order)  # as those of a bundle
    book = RuleBook(trie, catalogue.sets)
    rng = np.random.default_rng(SEED)
    history = tuple(rng.choice(items, HISTORY, replace=False).tolist())
    numbers = count(1)  # no filter comes twice

    def begin(*texts: str, boosted: bool = False) -> float:
        """How long it takes until a search can begin, on the thread that asks."""
        began = time.thread_time()
        rules, boosts = catalogue.resolve(Rules(exclude=history, filters=() if boosted else texts), NOW), list[Boost]()
        if boosted:
            boosts = [catalogue.boost(text, 2.0, NOW) for text in texts]
        book.boosts([boosts])
        with book.blocked([rules]):
            return (time.thread_time() - began) * 1000

    def new(text: str, boosted: bool = False) -> float:
        known.clear()
        return begin(text.format(n=next(numbers)), boosted=boosted)

    def first(text: str) -> tuple[float, float]:
        """A new filter's time without an index, and the time of indexing."""
        catalogue.fields.indexes = Indexes()
        before, began = time.thread_time(), time.process_time()
        found = new(text)
        catalogue.fields.indexes.wait()
        return found, max(0.0, time.process_time() - began - time.thread_time() + before) * 1000

    def changed(text: str) -> float:
        for row in rng.integers(items, size=CHANGED).tolist():
            values = catalogue.fields.of(row)
            catalogue.fields.put(row, {})
            catalogue.fields.put(row, values)
        return new(text)

    def read(text: str) -> float:
        known.clear()
        began = time.thread_time()
        parse_filter(text)
        return (time.thread_time() - began) * 1000

    def seen(text: str, boosted: bool) -> float:
        begin(text, boosted=boosted)
        return begin(text, boosted=boosted)

    unused = [new('price < {n} and brand == "b0"') for _ in range(len(book.sets))]
    yield {"items": items, "filter": "unused memory", "share": 0.0, "new_ms": median(unused)}
    yield {"items": items, "filter": "none", "share": 1.0, "seen_ms": median(begin() for _ in range(rounds))}
    for name, text in {**FILTERS, "boost, a fifth": FILTERS["a fifth, by price"]}.items():
        is_boost = name not in FILTERS
        one = text.format(n=next(numbers))
        row: Row = {"items": items, "filter": name}
        row["share"] = round(float(catalogue.members(Rules(filters=(one,), now=NOW)).mean()), 4)
        row["read_ms"] = median(read(text.format(n=next(numbers))) for _ in range(rounds))
        if not is_boost:
            times, indexing = zip(*(first(text) for _ in range(builds)), strict=True)
            row |= {"first_ms": median(times), "index_ms": median(indexing)}
        row["new_ms"] = median(new(text, is_boost) for _ in range(rounds))
        row["changed_ms"] = None if is_boost else median(changed(text) for _ in range(rounds))
        row["seen_ms"] = median(seen(text.format(n=next(numbers)), is_boost) for _ in range(rounds))
        yield row


def median(times: Iterable[float]) -> float:
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    main()
