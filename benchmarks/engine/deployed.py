"""What memory and dense score add to a search, by catalogue size: the answer as deployed against the search alone.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.deployed

`search` is the beam alone, from encoded histories to ranked items with the seen ones excluded. `memory` looks the
histories up in an item graph, scores as many of its best items as a bundle has by default and mixes; `dense` adds the
dense score and as many of its best items; `both` does all. One core, no reasoning steps, 50 beams, the 5M
network with random weights over a clustered catalogue; every item of a history has 200 neighbours, spread over the
catalogue. All four take turns in one process per size. Times are CPU time, medians over rounds; `times` is the ratio to
the search alone. `recall` is the share of the ten items with the highest dense score, as many as become candidates,
that the index names (no index: 1).
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Run, argument_parser, table
from benchmarks.engine.constraint import sizes
from benchmarks.engine.constraint_contenders import clustered_codes
from benchmarks.engine.sizes import HISTORY_ITEMS, SIZES, VOCABULARY, random_network
from serving.bundle import Bundle
from serving.engine import Engine
from serving.items.catalogue import Catalogue
from serving.items.item_index import EXACT_ITEMS, build_index
from serving.items.neighbours import Neighbours
from serving.search.beam import reason
from serving.search.dense import BEST
from serving.types import BundleSettings, Gate, Request, Rules
from training.config import NeighboursConfig

SEED = 0
BATCHES = (1, 8)
BEAMS = 50
NEIGHBOURS, CANDIDATES = NeighboursConfig().keep, NeighboursConfig().candidates
RECALLED = CANDIDATES
COMPARED = 1 << 18  # items at a time, exactly
HISTORIES = 64
ANSWERS = {"search": (0.0, 0.0), "memory": (1.0, 0.0), "dense": (0.0, 0.5), "both": (1.0, 0.5)}  # weights
COLUMNS = ["items", "batch", "answer", "ms", "times", "touched", "recall", "peak_gib"]

Row = dict[str, Any]


def main() -> None:
    parser = argument_parser("benchmarks.engine.deployed", __doc__)
    parser.add_argument("--items", type=sizes, default="1e4,1e6,1e7", help="catalogue sizes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--smoke", action="store_true", help="a small catalogue with an index and one round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/deployed.json")
    options = parser.parse_args()
    if options.smoke:
        options.items, options.rounds = [4000], 1
    run, rows = Run(parser, options), list[Row]()
    for items in options.items:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            indexed = options.smoke or items > EXACT_ITEMS
            rows += child.submit(measure, items, options.rounds, indexed).result()
        print(table(rows[-len(BATCHES) * len(ANSWERS) :], COLUMNS), flush=True)
    run.record(options.out, [SEED], rows)


@torch.inference_mode()
def measure(items: int, rounds: int, indexed: bool) -> list[Row]:
    """All answers at one size, in turns."""
    torch.set_num_threads(1)
    bundle, histories = deployed_bundle(items)
    if indexed:
        print(f"building the index of {items} items", file=sys.stderr, flush=True)
        bundle.item_index = build_index(items, bundle.vectors_of)
    engine = Engine(bundle, runtime="onnx")
    recall = recall_of(engine, histories)
    states = engine.encode(histories)
    found: dict[tuple[int, str], list[float]] = {(batch, name): [] for batch in BATCHES for name in ANSWERS}
    for turn in range(-1, rounds):  # the first makes what is made once
        for batch, name in found:
            chosen = [(turn * batch + i) % len(histories) for i in range(batch)]
            requests = [request(histories[i], *ANSWERS[name]) for i in chosen]
            began = time.process_time()
            answers = engine.search(requests, [states[i] for i in chosen])
            if turn >= 0:
                found[batch, name].append((time.process_time() - began) * 1000)
            assert all(len(answer.items) == 10 for answer in answers)
    assert bundle.neighbours is not None
    touched = bundle.neighbours.shares(histories, HISTORY_ITEMS)[0].items.shape[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        {
            "items": items,
            "batch": batch,
            "answer": name,
            "ms": round(statistics.median(times), 3),
            "times": round(statistics.median(times) / statistics.median(found[batch, "search"]), 2),
            "touched": touched,
            "recall": round(recall, 3),
            "peak_gib": round(peak, 2),
        }
        for (batch, name), times in found.items()
    ]


def request(history: tuple[int, ...], neighbours_weight: float, dense_weight: float) -> Request:
    rules = Rules(exclude=history)
    return Request(history, 10, BEAMS, 0, rules, dense_weight=dense_weight, neighbours_weight=neighbours_weight)


def deployed_bundle(items: int) -> tuple[Bundle, list[tuple[int, ...]]]:
    """A bundle in memory with a gate and a dense weight, and the histories whose items its graph knows."""
    rng = np.random.default_rng(SEED)
    histories = rng.integers(0, items, (HISTORIES, HISTORY_ITEMS))
    known = np.unique(histories)
    counts = np.zeros(items, np.int64)
    counts[known] = NEIGHBOURS
    graph = Neighbours(
        np.concatenate([[0], counts.cumsum()]),
        rng.integers(0, items, len(known) * NEIGHBOURS).astype(np.int32),
        rng.random(len(known) * NEIGHBOURS, np.float32),
        recency=1.0,
    )
    settings = BundleSettings(
        max_items=HISTORY_ITEMS,
        step_form="token",
        normalise="block",
        gate=Gate(-3.0, confidence=0.5),
        neighbours_weight=1.0,
        dense_weight=0.5,
        dense_candidates=CANDIDATES,
    )
    catalogue = Catalogue(
        item_ids=list(map(str, range(items))),
        tokens=VOCABULARY.tokens_of(clustered_codes(items, SEED)).astype(np.int32),
        titles=[None] * items,
        categories=[[]] * items,
        popularity=np.ones(items),
    )
    network = random_network(SIZES["5M"], items, SEED)
    bundle = Bundle("deployed", "deployed", VOCABULARY, settings, network, catalogue, neighbours=graph)
    return bundle, [tuple(history) for history in histories.tolist()]


def recall_of(engine: Engine, histories: list[tuple[int, ...]]) -> float:
    """The share of the RECALLED items nearest to each history's state that the index names."""
    bundle, index = engine.bundle, engine.bundle.item_index
    if index is None:
        return 1.0
    hidden = torch.from_numpy(np.stack([state.hidden for state in engine.encode(histories)]))
    cross = engine.runtime.cross_keys_values(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
    states = reason(engine.runtime, bundle.search_settings, cross, 0).states[:, 0, -1]
    products, best = torch.empty(len(states), 0), torch.empty(len(states), 0, dtype=torch.int64)
    for rows in torch.split(torch.arange(len(bundle.catalogue)), COMPARED):
        products = torch.cat([products, states @ bundle.vectors_of(rows).T], 1)
        best = torch.cat([best, rows.expand(len(states), -1)], 1)
        nearest = products.topk(RECALLED).indices
        products, best = products.gather(1, nearest), best.gather(1, nearest)
    named = index.search(states, BEST, bundle.vectors_of)[0]
    return float((best.unsqueeze(2) == named.unsqueeze(1)).any(2).float().mean())


if __name__ == "__main__":
    main()
