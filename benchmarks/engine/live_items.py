"""What it costs searches that items come and go: a quiet catalogue in turns with one that changes.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.live_items

Searches arrive at random times (open loop), at `--load` of what the engine does in a closed loop; each excludes its own
history, and every other one is limited to a category. Parts:

    quiet     nothing changes
    changes   `--rate` additions and as many removals a minute, through the catalogue's own log entries, as many at a
              time as come in 100 ms
    room      the same, while an index with more room is built beside the one in use, over and over

Times are from a search's arrival to its answer, and for changes from the entry to the moment from which searches know
of it. `times` is a part's p99 divided by that of the quiet turns of the same run; the bar is 1.5 for `changes`. The 5M
network with random weights, over a clustered catalogue; codes come with the entries, so no text is embedded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.constraint import sizes
from benchmarks.engine.constraint_contenders import clustered_codes
from benchmarks.engine.sizes import HISTORY_ITEMS, SIZES, VOCABULARY, random_network
from benchmarks.quantiles import rounded
from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import Overloaded
from serving.items.catalogue import Catalogue
from serving.online.admission import Admission, Demand
from serving.online.batcher import Batcher, Ticket
from serving.online.changelog import Entry
from serving.online.costs import CostTable
from serving.online.live_catalogue import LiveCatalogue
from serving.online.observer import Observer
from serving.online.searching import Search, run_batch
from serving.types import Answer, BundleSettings, Request, Rules

SEED = 0
BEAMS, CATEGORIES, HISTORIES = 50, 20, 512
PARTS = ("quiet", "changes", "room")
TICK_S = 0.1  # changes of this time are made together
SETTLE_S = 1.0  # at the start of a turn, which does not count
CLOSED_CLIENTS = 4
BAR = 1.5
COLUMNS = ["items", "part", "searches", "refused", "p50_ms", "p99_ms", "times", "changes", "change_p99_ms"]

Row = dict[str, Any]


def main() -> None:
    parser = argument_parser("benchmarks.engine.live_items", __doc__)
    parser.add_argument("--items", type=sizes, default="1e6", help="catalogue sizes (%(default)s)")
    parser.add_argument("--rate", type=int, default=10_000, help="additions, and removals, a minute (%(default)s)")
    parser.add_argument("--load", type=float, default=0.5, help="of a closed loop's searches a second (%(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="of every part (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="length of a turn (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a small catalogue and short turns")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/live_items.json")
    options = parser.parse_args()
    if options.smoke:
        options.items, options.turns, options.seconds = [3000], 1, 1.0
    run, rows = Run(parser, options), list[Row]()
    for items in options.items:
        settle = 0.0 if options.smoke else SETTLE_S
        rows += asyncio.run(measure(items, options.rate, options.load, options.turns, options.seconds, settle))
        print(table(rows[-len(PARTS) :], COLUMNS), flush=True)
    run.record(options.out, [SEED], rows, bar=BAR)


class Shop:
    """An engine behind a queue, its live catalogue, and entries that add and remove items."""

    def __init__(self, items: int, spare: int) -> None:
        codes = clustered_codes(items + spare, SEED)
        self.bundle = Bundle(
            "live", "live", VOCABULARY, BundleSettings(max_items=HISTORY_ITEMS, step_form="token", normalise="block"),
            random_network(SIZES["5M"], items, SEED),
            Catalogue(
                item_ids=list(map(str, range(items))),
                tokens=VOCABULARY.tokens_of(codes[:items]).astype(np.int32),
                titles=[None] * items,
                categories=[[f"c{row % CATEGORIES}"] for row in range(items)],
                popularity=np.ones(items),
            ),
        )  # fmt: skip
        self.engine, self.costs = Engine(self.bundle, runtime="onnx"), CostTable()
        admission: Admission[Ticket[Search, Answer]] = Admission(
            self.costs, max_batch=16, max_rows=1600, max_wait=5.0, clock=time.monotonic
        )
        self.batcher: Batcher[Search, Answer] = Batcher(
            admission, lambda searches: run_batch(searches, self.costs, Observer())
        )
        self.catalogue = LiveCatalogue(self.engine, self.batcher.between_batches)
        rng = np.random.default_rng(SEED)
        self.histories = [tuple(history) for history in rng.integers(0, items, (HISTORIES, HISTORY_ITEMS)).tolist()]
        self._entries = self._made(codes[items:].tolist(), rng.permutation(items).tolist())
        self.searched = 0

    def _made(self, codes: list[list[int]], rows: list[int]) -> Iterator[tuple[Entry, Entry]]:
        for number, (new, old) in enumerate(zip(codes, rows, strict=False)):
            text = {"title": f"new {number}", "categories": [f"c{number % CATEGORIES}"], "fields": {}}
            ids = {"codes_of": self.bundle.version, "codes": new[:-1], "last_codes": new[-1:]}
            window = {"available_from": None, "available_until": None}
            added = {"do": "put", "item_id": f"new {number}", "brand": None, "description": None}
            yield {**added, **text, **ids, **window}, {"do": "delete", "item_id": str(old)}

    def entries(self, pairs: int) -> list[Entry]:
        return [entry for _ in range(pairs) for entry in next(self._entries)]

    async def search(self) -> None:
        history = self.histories[self.searched % HISTORIES]
        self.searched += 1
        categories = (f"c{self.searched % CATEGORIES}",) if self.searched % 2 else ()
        request = Request(history, 10, BEAMS, 0, Rules(exclude=history, categories=categories))
        demand = Demand(0, BEAMS, time.monotonic() + 60)
        found = (await self.batcher.submit(demand, lambda plan: Search(self.engine, request))).result
        assert len(found.items) == 10


class Turns:
    """What was measured of one part, over all its turns. Milliseconds."""

    def __init__(self) -> None:
        self.searches: list[float] = []
        self.changes: list[float] = []
        self.changed = self.refused = 0


async def measure(items: int, rate: int, load: float, turns: int, seconds: float, settle: float) -> list[Row]:
    shop = Shop(items, int(rate / 60 * seconds * turns * 2) + rate)
    shop.batcher.start()
    await shop.catalogue.apply(shop.entries(1))  # from here on the catalogue is one that changes
    capacity = await closed_loop(shop, min(seconds, 10.0))
    parts = {part: Turns() for part in PARTS}
    for turn in range(turns):
        for part in PARTS:
            await take_turn(shop, part, parts[part], rate, load * capacity, seconds, settle, SEED + turn)
    await shop.catalogue.close()
    await shop.batcher.drain()
    quiet = rounded(parts["quiet"].searches, 0.99) or 1.0
    return [
        {
            "items": items,
            "part": part,
            "searches": len(found.searches),
            "refused": found.refused,
            "p50_ms": rounded(found.searches, 0.5),
            "p99_ms": rounded(found.searches, 0.99),
            "times": round((rounded(found.searches, 0.99) or 0.0) / quiet, 2),
            "changes": found.changed,
            "change_p99_ms": rounded(found.changes, 0.99),
            "load_per_s": round(load * capacity, 1),
        }
        for part, found in parts.items()
    ]


async def closed_loop(shop: Shop, seconds: float) -> float:
    """Searches a second of clients that ask without pause, after as long a warm-up."""
    for _ in range(2):
        before, until = shop.searched, time.monotonic() + seconds
        await asyncio.gather(*(_ask_until(shop, until) for _ in range(CLOSED_CLIENTS)))
    return (shop.searched - before) / seconds


async def _ask_until(shop: Shop, until: float) -> None:
    while time.monotonic() < until:
        await shop.search()


async def take_turn(
    shop: Shop, part: str, into: Turns, rate: int, searches_per_s: float, seconds: float, settle: float, seed: int
) -> None:
    began = time.monotonic()
    running = []
    if part != "quiet":
        running.append(asyncio.create_task(make_changes(shop, into, rate, began + seconds)))
    if part == "room":
        running.append(asyncio.create_task(make_room(shop, began + seconds)))
    gaps = np.random.default_rng(seed).exponential(1 / searches_per_s, int(2 * seconds * searches_per_s) + 10)
    arrivals = gaps.cumsum() - gaps[0]
    for arrival in arrivals[arrivals < seconds].tolist():
        await asyncio.sleep(max(0.0, began + arrival - time.monotonic()))
        running.append(asyncio.create_task(timed_search(shop, into, began + arrival, arrival >= settle)))
    await asyncio.gather(*running)


async def timed_search(shop: Shop, into: Turns, arrival: float, counts: bool) -> None:
    try:
        await shop.search()
    except Overloaded:
        into.refused += 1
        return
    if counts:
        into.searches.append((time.monotonic() - arrival) * 1000)


async def make_changes(shop: Shop, into: Turns, rate: int, until: float) -> None:
    pairs = max(1, round(rate / 60 * TICK_S))
    while (started := time.monotonic()) < until:
        entries = shop.entries(pairs)
        results = await shop.catalogue.apply(entries)
        assert all(isinstance(result, int) for result in results)
        into.changed += len(entries)
        into.changes.append((time.monotonic() - started) * 1000)
        await asyncio.sleep(max(0.0, started + pairs * 60 / rate - time.monotonic()))


async def make_room(shop: Shop, until: float) -> None:
    while time.monotonic() < until:
        index = await asyncio.to_thread(shop.engine.with_room)
        await shop.batcher.between_batches(partial(shop.engine.adopt, index))


if __name__ == "__main__":
    main()
