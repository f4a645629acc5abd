"""What filters and boosts cost, new and seen before, over catalogues of a million items.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.filters

All times are milliseconds of one core, medians of `--rounds` filters. `read`: from text to expression. `new`: until a
search can begin, with a filter that nobody has sent before: read, evaluated over all items and prepared. `seen`: the
same, of one that somebody has; `none` stands for a request without any filter, which excludes its history as all others
do. The sets of `new` replace others, as they do in a service that has run for a while; `fresh` is `new` while they
still take memory that nothing has been written to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.constraint import sizes
from benchmarks.engine.constraint_contenders import clustered_codes
from serving.items.catalogue import Catalogue
from serving.items.fields import Fields, Strings
from serving.items.filter_parser import MAX_COST, known, parse_filter
from serving.items.labels import Labels
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.items.value_index import PARTS
from serving.types import Boost, Rules

SEED = 0
BRANDS, SIZES, SHADES, HISTORY = 1000, 20, PARTS + 2, 20
LONGEST = 2 * MAX_COST  # list
SOME_SHADES = ", ".join(f'"{2 * each}"' for each in range(LONGEST - 1))
DAY, NOW = 86400.0, 1.8e9
COLUMNS = ["items", "filter", "share", "read_ms", "fresh_ms", "new_ms", "seen_ms"]
FILTERS = {  # by the name of a row; {n} makes each round's another one
    "one brand": 'brand == "b{n}"',
    "a fifth, by price": "price < 20.{n}",
    "four fifths, by price": "price < 80.{n}",
    "three fields": 'price < 50.{n} and brand in ["b1", "b2", "b3", "b4"] and not sizes has "s1"',
    "the last week": "added > now - 7.{n}d",
    f"{LONGEST} prices": f"price in [{', '.join(f'{each}.{{n}}' for each in range(LONGEST))}]",
    f"{LONGEST} shades": f'shade in [{SOME_SHADES}, "new {{n}}"]',
    f"{LONGEST} tags": f'tags has [{SOME_SHADES}, "new {{n}}"]',
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
    parser.add_argument("--smoke", action="store_true", help="a small catalogue and few rounds")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/filters.json")
    options = parser.parse_args()
    if options.smoke:
        options.items, options.rounds = [3000], 3
    run, rows = Run(parser, options), list[Row]()
    for items in options.items:
        rows += measure(items, options.rounds)
        print(table(rows[-len(FILTERS) - 2 :], COLUMNS), flush=True)
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


def measure(items: int, rounds: int) -> Iterator[Row]:
    catalogue = catalogue_of(items)
    book = RuleBook(build_trie(catalogue.tokens), catalogue.members)
    history = tuple(np.random.default_rng(SEED).choice(items, HISTORY, replace=False).tolist())

    def begin(*texts: str, boosted: bool = False) -> float:
        """How long it takes until a search can begin."""
        began = time.process_time()
        rules, boosts = catalogue.resolve(Rules(exclude=history, filters=() if boosted else texts), NOW), list[Boost]()
        if boosted:
            boosts = [catalogue.boost(text, 2.0, NOW) for text in texts]
        book.boosts([boosts])
        with book.blocked([rules]):
            return (time.process_time() - began) * 1000

    def median(times: list[float]) -> float:
        return round(statistics.median(times), 3)

    fresh = {name: begin(text.format(n=0)) for name, text in FILTERS.items()}
    for number in range(len(book.sets)):  # from here on sets replace each other
        begin(f'price < {number} and brand == "b0"')
    without = [begin() for _ in range(rounds)]
    yield {"items": items, "filter": "none", "share": 1.0, "seen_ms": median(without)}
    for name, text in {**FILTERS, "boost, a fifth": FILTERS["a fifth, by price"]}.items():
        is_boost = name not in FILTERS
        first = 1 + rounds * is_boost
        texts = [text.format(n=number) for number in range(first, first + rounds)]
        read, new, seen = [], [], []
        for own in texts:
            passing = catalogue.members(Rules(filters=(own,), now=NOW))
            known.clear()
            began = time.process_time()
            parse_filter(own)
            read.append((time.process_time() - began) * 1000)
            known.clear()
            new.append(begin(own, boosted=is_boost))
            seen.append(begin(own, boosted=is_boost))
        yield {
            "items": items, "filter": name, "share": round(float(passing.mean()), 4), "read_ms": median(read),
            "fresh_ms": round(fresh[name], 3) if name in fresh else None,
            "new_ms": median(new), "seen_ms": median(seen),
        }  # fmt: skip


if __name__ == "__main__":
    main()
