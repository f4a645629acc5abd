"""What reasoning steps cost: one search by ONNX Runtime on one core, by number of steps and beam width.

    python -m benchmarks.engine.latency --bundle bundles/demo

Cases take turns, so that a noisy moment of the machine affects all of them. `ratio` compares with no steps at the same
beam width and batch; between machines compare ratios, not times.
"""

from __future__ import annotations

import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from serving.bundle import Bundle
from serving.engine import Engine
from serving.types import Request, Rules

BEAMS = (20, 50, 100)
COLUMNS = ["steps", "beam", "batch", "median_ms", "p95_ms", "ratio"]


def main() -> None:
    parser = argument_parser("benchmarks.engine.latency", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/latency.json")
    options = parser.parse_args()
    run, bundle = Run(parser, options), Bundle.load(options.bundle)
    rows = measure(Engine(bundle, runtime="onnx"), options.rounds)
    print(table(rows, COLUMNS))
    parameters = sum(parameter.numel() for parameter in bundle.network.t5.parameters())
    run.record(options.out, [0], rows, bundle=bundle.name, parameters=parameters)


def measure(engine: Engine, rounds: int) -> list[dict[str, Any]]:
    """Times the search alone, from encoded histories, seen items excluded, for one request and a batch of eight."""
    items, rng = len(engine.bundle.catalogue), np.random.default_rng(0)
    histories = [tuple(rng.integers(0, items, 10).tolist()) for _ in range(8)]
    states = engine.encode(histories)
    cases = list(product(range(0, engine.bundle.max_steps + 1, 2), BEAMS, (1, 8)))
    times: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 2):
        for steps, beam, batch in cases:
            requests = [Request(h, 10, beam, steps, Rules(exclude=h)) for h in histories[:batch]]
            begin = time.perf_counter()
            engine.search(requests, states[:batch])
            if turn >= 2:  # the first rounds warm up
                times[steps, beam, batch].append((time.perf_counter() - begin) * 1000)
    medians = {case: statistics.median(values) for case, values in times.items()}
    return [
        {
            "steps": steps,
            "beam": beam,
            "batch": batch,
            "median_ms": round(medians[steps, beam, batch], 3),
            "p95_ms": round(float(np.percentile(times[steps, beam, batch], 95)), 3),
            "ratio": round(medians[steps, beam, batch] / medians[0, beam, batch], 3),
        }
        for steps, beam, batch in cases
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
