"""What offline scoring costs on top of the engine: users a second, and ratios within one run.

    python -m benchmarks.engine.scoring --bundle bundles/demo

Three contenders take turns over the same users: the engine alone on prepared requests, in batches in the order of the
file and in batches by history length, and `serving.offline.score` from file to file. `ratio` compares with the engine
alone on batches by length.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from serving.bundle import Bundle
from serving.engine import Engine
from serving.offline.input import Part
from serving.offline.score import score
from serving.offline.scorer import Scorer, Task
from serving.types import Request, Rules

COLUMNS = ["contender", "users", "batch", "steps", "seconds", "users_per_second", "ratio"]


def main() -> None:
    parser = argument_parser("benchmarks.engine.scoring", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--users", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/scoring.json")
    options = parser.parse_args()
    run = Run(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Bundle.load(options.bundle), runtime=Task.runtime)
        rows = measure(engine, options.users, options.rounds, Path(folder))
    print(table(rows, COLUMNS))
    run.record(options.out, [0], rows, bundle=options.bundle.name)


def measure(engine: Engine, users: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """The fastest round of each contender counts: on a shared machine the others include its other work."""
    catalogue, rng = engine.bundle.catalogue, np.random.default_rng(0)
    histories = [rng.integers(0, len(catalogue), rng.integers(1, 31)).tolist() for _ in range(users)]
    names = [[catalogue.item_ids[row] for row in history] for history in histories]
    pq.write_table(pa.table({"user_id": [f"u{n}" for n in range(users)], "history": names}), folder / "histories")
    assert engine.bundle.folder is not None
    task = Task(engine.bundle.folder, folder / "histories", folder / "out.parquet")
    steps, longest = engine.bundle.default_steps, engine.bundle.max_items
    requests = [Request(tuple(h[-longest:]), task.k, task.beam, steps, Rules(exclude=tuple(set(h)))) for h in histories]

    def whole(task: Task, _: Bundle, parts: Sequence[Part]) -> Iterator[int]:
        scorer = Scorer(task, engine)
        for part in parts:
            yield from scorer.score(part)

    def bare(ordered: list[Request]) -> None:
        for first in range(0, users, task.batch):
            batch = ordered[first : first + task.batch]
            engine.search(batch, engine.encode([request.history for request in batch]))

    contenders: dict[str, Callable[[], object]] = {
        "engine, batches in order of the file": lambda: bare(requests),
        "engine, batches by length": lambda: bare(sorted(requests, key=lambda request: len(request.history))),
        "serving.offline.score": lambda: score(task, whole),
    }
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return [
        {
            "contender": name,
            "users": users,
            "batch": task.batch,
            "steps": steps,
            "seconds": round(took, 3),
            "users_per_second": round(users / took, 1),
            "ratio": round(seconds["engine, batches by length"] / took, 3),
        }
        for name, took in seconds.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
