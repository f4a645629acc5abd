"""How long a service takes to be ready, and what of that each part takes, by catalogue size (Linux).

    OMP_NUM_THREADS=1 python -m benchmarks.engine.start

For every size a bundle is written (the 5M network with random weights, titles, 50 categories, an item graph with 50
neighbours of each item) and read once, so that the disk is warm. `ready_s` is the time from the command `python -m app
serve --workers 2` to the first 200 of /readyz, on two cores. Both workers share `shared_gib` of memory then; the larger
of them has `worker_gib` of its own, which is what every further one would take. The other columns are CPU seconds of a
process that opens the bundle (`load_s`: the hashes of all files, catalogue, trie, item graph, weights, index of titles,
and the rest), makes an engine and searches a first time. `title_ms` is the slowest of some searches over titles.
"""

from __future__ import annotations

import cProfile
import json
import multiprocessing
import pstats
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Run, argument_parser, table
from benchmarks.engine.constraint import sizes
from benchmarks.engine.constraint_contenders import clustered_codes
from benchmarks.engine.sizes import HISTORY_ITEMS, SIZES, VOCABULARY, random_network
from benchmarks.service.processes import running_service
from serving.bundle import Bundle
from serving.bundle_writer import write_bundle
from serving.engine import Engine
from serving.items.catalogue import Catalogue
from serving.items.neighbours import Neighbours
from serving.types import BundleSettings, Gate

SEED = 0
NEIGHBOURS, CATEGORIES = 50, 50
WORDS = ("red", "blue", "small", "large", "old", "new", "light", "dark", "plain", "fine")
NOUNS = ("shoe", "lamp", "chair", "guitar", "kettle", "tent", "watch", "puzzle", "jacket", "knife")
QUERIES = ("red shoe", "guitar 1234", "no such thing", "9999")
# Columns, and the functions whose CPU time they state.
PARTS = {
    "files_s": "check_files",
    "catalogue_s": "read_catalogue",
    "trie_s": "read_trie",
    "graph_s": "read_neighbours",
    "weights_s": "_read_weights",
    "titles_s": "read_titles",
    "load_s": "load",
    "engine_s": "__init__",
    "warm_s": "warm_up",
}
COLUMNS = ["items", "ready_s", *PARTS, "shared_gib", "worker_gib", "title_ms"]

Row = dict[str, Any]


def main() -> None:
    parser = argument_parser("benchmarks.engine.start", __doc__)
    parser.add_argument("--items", type=sizes, default="1e5,1e6,1e7", help="catalogue sizes (%(default)s)")
    parser.add_argument("--smoke", action="store_const", dest="items", const=[2000], help="2,000 items only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/start.json")
    options = parser.parse_args()
    run, rows = Run(parser, options), list[Row]()
    for items in options.items:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "bundle"
            _in_a_process(write, path, items)
            rows.append({"items": items, **_in_a_process(parts, path), **ready(path)})
        print(table(rows, COLUMNS), flush=True)
    run.record(options.out, [SEED], rows)


def _in_a_process(work: Any, *given: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(work, *given).result()


def write(path: Path, items: int) -> None:
    rng = np.random.default_rng(SEED)
    graph = Neighbours(
        np.arange(items + 1) * NEIGHBOURS,
        rng.integers(0, items, items * NEIGHBOURS, np.int32),
        rng.random(items * NEIGHBOURS, np.float32),
        recency=1.0,
    )
    categories = [[f"category {number}"] for number in range(CATEGORIES)]
    catalogue = Catalogue(
        item_ids=[f"item-{row}" for row in range(items)],
        tokens=VOCABULARY.tokens_of(clustered_codes(items, SEED)).astype(np.int32),
        titles=[f"{WORDS[row % 10]} {NOUNS[row // 10 % 10]} {row}" for row in range(items)],
        categories=[categories[row % CATEGORIES] for row in range(items)],
        popularity=rng.integers(0, 1000, items).astype(np.float64),
    )
    settings = BundleSettings(
        max_items=HISTORY_ITEMS, step_form="token", normalise="block", gate=Gate(-3.0), neighbours_weight=1.0
    )
    network = random_network(SIZES["5M"], items, SEED)
    bundle = Bundle("start", "", VOCABULARY, settings, network, catalogue, neighbours=graph)

    def write_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(json.dumps({"kind": "random"}))

    write_bundle(path, bundle, model_card="# start\n", write_tokenizer=write_tokenizer)


def parts(path: Path) -> Row:
    """CPU seconds of each part; the first opening, which reads the files from the disk, does not count."""
    torch.set_num_threads(1)
    Bundle.load(path)
    profile = cProfile.Profile(time.process_time)
    bundle = profile.runcall(Bundle.load, path)
    engine = profile.runcall(Engine, bundle, runtime="onnx")
    profile.runcall(engine.warm_up)
    took: dict[str, float] = {}
    for (_, _, name), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        took[name] = max(took.get(name, 0), cumulative)
    slowest = 0.0
    for query in QUERIES:
        began = time.process_time()
        bundle.catalogue.find_titles(query, 20)
        slowest = max(slowest, time.process_time() - began)
    return {column: round(took[name], 2) for column, name in PARTS.items()} | {"title_ms": round(slowest * 1000, 2)}


def ready(path: Path) -> Row:
    began = time.perf_counter()
    with running_service(path, ["--workers", "2"], cores={0, 1}) as server:
        took = time.perf_counter() - began
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        own, shared = max(_memory_gib(pid) for pid in children)
    return {"ready_s": round(took, 2), "shared_gib": round(shared, 2), "worker_gib": round(own, 2)}


def _memory_gib(pid: str) -> tuple[float, float]:
    """What a process has for itself, and what it shares with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {name: int(size) for name, size, _ in (line.split() for line in lines[1:])}
    own, shared = (sum(sizes[f"{kind}_{state}:"] for state in ("Clean", "Dirty")) for kind in ("Private", "Shared"))
    return own / 2**20, shared / 2**20


if __name__ == "__main__":
    main()
