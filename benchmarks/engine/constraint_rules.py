"""What a request's rules add to a search: preparing them, checking them at every step, and undoing them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.engine.constraint_contenders import Ours
from benchmarks.engine.constraint_walk import SAMPLES, SEED, Row, Walk, samples
from serving.items.order import ItemSets
from serving.items.rules import RuleBook
from serving.items.trie import Trie
from serving.types import Rules

LISTED = 10_000  # items of an allow or deny list
SUBSET, RULED = "a fifth", "subset and deny"


def kinds_of_rules(items: int) -> dict[str, Rules]:
    rng = np.random.default_rng(SEED)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.choice(items, count, replace=False).tolist())

    return {
        "exclude 20": Rules(exclude=some(20)),
        "subset and exclude 20": Rules(catalogue=SUBSET, exclude=some(20)),
        "deny 10,000": Rules(deny=some(LISTED)),
        "allow 10,000": Rules(allow=some(LISTED)),
        "subset": Rules(catalogue=SUBSET),
        RULED: Rules(catalogue=SUBSET, deny=some(LISTED)),
    }


def rule_book(trie: Trie, rows: int = 1) -> RuleBook:
    """With one named subset, a fifth of the items."""
    items = len(trie.item)
    fifth = np.random.default_rng(SEED + 1).permutation(items) < items // 5
    return RuleBook(trie, ItemSets(lambda _: fifth), rows=rows)


def rules(catalogues: dict[int, Path], rounds: int) -> Iterator[Row]:
    """One request with 50 beams. `first_ms`: the first use, which prepares a subset and touches its memory first."""
    log_probs = samples(1)
    for items, path in catalogues.items():
        ours = Ours(np.load(path))
        book, kinds = rule_book(ours.trie), kinds_of_rules(items)
        walk = Walk(ours)
        first, set_up, whole = (
            dict[str, float](),
            defaultdict[str, list[float]](list),
            defaultdict[str, list[float]](list),
        )
        for name, rule in {"none": Rules(), **kinds}.items():
            began = time.process_time()
            with book.blocked([rule]):
                pass
            first[name] = time.process_time() - began
        for turn in range(rounds + SAMPLES):
            for name, rule in {"none": Rules(), **kinds}.items():
                began = time.process_time()
                with book.blocked([rule]) as ours.blocked:
                    prepared = time.process_time()
                    walk.run(log_probs[turn % SAMPLES])
                    searched = time.process_time()
                done = time.process_time()
                if turn >= SAMPLES:
                    set_up[name].append(prepared - began + done - searched)
                    whole[name].append(done - began)
        without = statistics.median(whole["none"])
        for name in kinds:
            yield {
                "items": items,
                "rules": name,
                "added_ms": round((statistics.median(whole[name]) - without) * 1000, 3),
                "set_up_ms": round(statistics.median(set_up[name]) * 1000, 3),
                "first_ms": round(first[name] * 1000, 3),
            }
