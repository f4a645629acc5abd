"""What reasoning paths bring and what they cost: accuracy and time of a search, by steps and number of paths.

    python -m benchmarks.accuracy.paths --data runs/demo/shop

Accuracy as in `training evaluate`: test, seen items excluded, 50 beams. `ms` is one search of 50 beams from an encoder
state, by ONNX Runtime, as the service runs it: the process's CPU time, medians, all kinds in turns; `times_no_steps` is
to a search without reasoning. A bundle states the number of paths it wants, a request may ask for another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, commit, record, result_file, table
from benchmarks.engine.breakdown import clock
from serving.bundle import Bundle
from serving.engine import Engine
from serving.types import Request, Rules
from training.data.read import Dataset, read_data
from training.evaluate import evaluate_bundle

RESULT = ROOT / "benchmarks/results/paths.json"
BEAMS = 50
STEPS = (2, 4)
PATHS = (1, 2, 4, 8)
COLUMNS = ["steps", "paths", "recall@10", "ndcg@10", "ms", "times_no_steps"]

Kind = tuple[int, int]  # steps, paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.paths", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--data", type=Path, default=Path("runs/demo/shop"), help="what the bundle was trained on")
    parser.add_argument("--users", type=int, default=0, help="how many users, drawn with a fixed seed; 0: all")
    parser.add_argument("--rounds", type=int, default=60, help="searches of each kind")
    parser.add_argument("--out", type=result_file, default=RESULT)
    options = parser.parse_args(arguments)
    code, started = commit(), time.perf_counter()
    bundle, data = Bundle.load(options.bundle), read_data(options.data)
    kinds = [(0, 1), *product([steps for steps in STEPS if steps <= bundle.max_steps], PATHS)]
    costs = cost(Engine(bundle, runtime="onnx"), kinds, options.rounds)
    rows = [accuracy(bundle, data, kind, options.users) | costs[kind] for kind in kinds]
    print(table(rows, COLUMNS))
    record(
        options.out,
        f"python -m benchmarks.accuracy.paths --bundle {options.bundle} --data {options.data} --users {options.users}"
        f" --rounds {options.rounds}",
        [0],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        version=bundle.version,
        **code,
    )


def accuracy(bundle: Bundle, data: Dataset, kind: Kind, users: int) -> dict[str, Any]:
    steps, paths = kind
    (row,) = evaluate_bundle(bundle, data, [steps], "test", BEAMS, users, exclude_seen=True, paths=paths)
    return {name: row[name] for name in ("steps", "paths", "users", "beam", "recall@10", "ndcg@10")}


def cost(engine: Engine, kinds: list[Kind], rounds: int) -> dict[Kind, dict[str, Any]]:
    """One request with a full history of random items, whose encoder state is there already."""
    bundle = engine.bundle
    history = tuple(np.random.default_rng(0).integers(0, len(bundle.catalogue), bundle.max_items).tolist())
    states = engine.encode([history])
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 2):
        for steps, paths in kinds:
            request = Request(history, 10, BEAMS, steps, Rules(exclude=history), paths=paths)
            began = clock()
            engine.search([request], states)
            if turn >= 2:  # the first ones warm up
                seconds[steps, paths].append(clock() - began)
    ms = {kind: 1000 * statistics.median(taken) for kind, taken in seconds.items()}
    return {
        kind: {"ms": round(value, 2), "times_no_steps": round(value / ms[kinds[0]], 2)} for kind, value in ms.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
