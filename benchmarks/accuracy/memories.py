"""What needs no network: tuned neighbours, a linear next-item model, and the memories of a bundle, on a data folder.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.memories --data DIR --out benchmarks/results/memory-NAME.json

`counted` counts and compares texts, `linear` is the linear model, and `both` the blend that validation prefers
(`training/memory.py`). Gains are of NDCG@10 against tuned neighbours.

Leave-one-out, test, full ranking, history of 20 items; every row once with and once without the items of the history
excluded, each with its own choice. Everything is learnt from the training part and chosen by validation NDCG@10, with
the history's items excluded where the row has them excluded, the memories on up to 4,000 users; `validation` holds what
their choices were worth to users who did not make them.
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.baselines import CACHE, fit
from benchmarks.accuracy.converged import memory_scores
from benchmarks.accuracy.full_ranking import Score, rank
from benchmarks.accuracy.ranks import gain_over
from benchmarks.accuracy.sasrec import Setting
from benchmarks.common import argument_parser, commit, record, result_file, table
from training.config import EvalConfig, MemoryParts, RunConfig
from training.data.prepare import Split, leave_one_out
from training.data.read import Items, read_data
from training.memory import fit_memories
from training.metrics import mean_metrics, ndcg, target_ranks

TUNED = "neighbours"
KINDS: tuple[MemoryParts, ...] = ("counted", "linear", "both")
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
COLUMNS = ("model", "excluded", *METRICS, "gain", "low", "high", "percent", "against")
PROTOCOL = " ".join((__doc__ or "").split("\n\n")[-1].split())


def rows_of(ranks: dict[str, np.ndarray], excluded: bool) -> list[dict[str, Any]]:
    """ranks: where each model puts the users' targets, from 0, 10 for all beyond. Shape of each: (U,)."""
    pairs = [(name, TUNED) for name in ranks if name != TUNED] + [("both", "counted"), ("both", "linear")]
    rows = []
    for name, against in [(TUNED, None), *pairs]:
        row: dict[str, Any] = {"model": name, "split": "test", "excluded": excluded, "users": len(ranks[name])}
        row |= {metric: round(value, 5) for metric, value in mean_metrics(ranks[name]).items()}
        if against is not None:
            row["against"] = against
            row |= gain_over(ndcg(ranks[name]), ndcg(ranks[against]))
        rows.append(row | ({} if against in (None, TUNED) else {"part": "pair"}))
    return rows


def run(split: Split, items: Items, config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The test's rows, and what validation says of each choice."""
    rows, validation = [], []
    for excluded in (False, True):
        tuned = fit(TUNED, split, items, 0, Setting(), lambda line: print(line, file=sys.stderr), exclude_seen=excluded)
        scores: dict[str, Score] = {TUNED: tuned.score}
        chosen = {"setting": tuned.setting, "seconds": round(tuned.seconds, 1)}
        validation.append({"model": TUNED, "excluded": excluded, **chosen})
        by_rule = config.model_copy(update={"evaluation": EvalConfig(exclude_seen=excluded)})
        for kind, memory in fit_memories(items, split, by_rule, CACHE, KINDS).items():
            scores[kind] = memory_scores(memory.whole)
            validation.append({"model": kind, "excluded": excluded, **memory.report})
            print(kind, memory.report, file=sys.stderr)
        ranks = {
            name: target_ranks(rank(score, split.test_history, excluded), split.test_target)
            for name, score in scores.items()
        }
        rows += rows_of(ranks, excluded)
    return rows, validation


def main(arguments: list[str]) -> None:
    parser = argument_parser("benchmarks.accuracy.memories", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="a data folder (interactions.csv.gz, ...)")
    parser.add_argument("--out", type=result_file, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    started, code = time.perf_counter(), commit()
    data = read_data(options.data)
    rows, validation = run(leave_one_out(data), data.items, RunConfig())
    command = shlex.join(["python", "-m", "benchmarks.accuracy.memories", *arguments])
    record(
        options.out,
        command,
        [0],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        data=data.name,
        protocol=PROTOCOL,
        validation=validation,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **code,
    )
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
