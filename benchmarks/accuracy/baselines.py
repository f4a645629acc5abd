"""Popularity, item-to-item neighbours, the item memories of a bundle, and SASRec, all under the project's protocol.

`neighbours+text` counts and compares texts, `linear` is the linear next-item model, and `memory` the blend of both that
validation prefers (`training/memory.py`).

    python -m benchmarks.accuracy.baselines --data DIR --out benchmarks/results/baselines-NAME.json

Leave-one-out, full ranking, history of 20 items; every row once with and once without the items of the history
excluded. Everything is learnt from the training part and chosen by validation NDCG@10 (nothing excluded). For the
test only the history grows by the validation item: nothing is counted or trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import neighbours, sasrec
from benchmarks.accuracy.full_ranking import HISTORY_ITEMS, Score, rank
from benchmarks.accuracy.popularity import Popularity
from benchmarks.common import ROOT, commit, record, result_file, table
from training.config import EvalConfig, MemoryParts, NeighboursConfig, RunConfig
from training.data.prepare import Split, leave_one_out
from training.data.read import Items, read_data
from training.memory import fit_memory
from training.metrics import recall_ndcg

METRICS = ["recall@5", "recall@10", "ndcg@5", "ndcg@10"]
MEMORIES: dict[str, MemoryParts] = {"neighbours+text": "counted", "linear": "linear", "memory": "both"}
MODELS = ("popularity", "neighbours", *MEMORIES, "sasrec")
CACHE = ROOT / "runs/cache"  # of text embeddings, which take minutes
PROTOCOL = " ".join((__doc__ or "").split("\n\n")[-1].split())  # goes with the figures


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """A model ready to rank, the setting that validation chose, and the seconds both took."""

    model: str
    score: Score
    setting: dict[str, Any]
    seconds: float
    seed: int | None = None  # None: no chance in it


def fit(
    model: str,
    split: Split,
    items: Items,
    seed: int,
    sasrec_setting: sasrec.Setting,
    report: Callable[[str], None],
    *,
    exclude_seen: bool = False,
) -> Fitted:
    """Learns from split.train, chooses by the validation part, with seen items excluded or not."""
    count, chosen_by = len(items), EvalConfig(exclude_seen=exclude_seen)

    def validation_ndcg(candidate: neighbours.Neighbours | sasrec.SASRec) -> float:
        ranked = rank(candidate.scores, split.valid_history, exclude_seen=exclude_seen)
        return recall_ndcg(ranked, split.valid_target)["ndcg@10"]

    start = time.perf_counter()
    if model == "popularity":
        return Fitted(model, Popularity(split.train, count).scores, {}, time.perf_counter() - start)
    if model == "neighbours":
        near, _ = neighbours.tune(split.train, count, validation_ndcg)
        return Fitted(model, near.scores, dataclasses.asdict(near.setting), time.perf_counter() - start)
    if model in MEMORIES:
        config = RunConfig(neighbours=NeighboursConfig(parts=MEMORIES[model]), evaluation=chosen_by)
        memory = fit_memory(items, split, config, CACHE)
        seconds = time.perf_counter() - start

        def shares(histories: list[np.ndarray]) -> np.ndarray:
            return memory.whole.shares(histories, HISTORY_ITEMS)[0].dense(count)

        return Fitted(model, shares, memory.report, seconds)
    if model == "sasrec":
        net, epoch, _ = sasrec.train(split.train, count, sasrec_setting, seed, validation_ndcg, report)
        chosen = dataclasses.asdict(sasrec_setting) | {"best_epoch": epoch}
        return Fitted(model, net.scores, chosen, time.perf_counter() - start, seed)
    raise ValueError(f"no model named {model!r}: choose from {', '.join(MODELS)}")


def rows_of(fitted: Fitted, split: Split) -> list[dict[str, Any]]:
    """Four rows: validation and test, with and without seen items excluded."""
    parts: list[tuple[str, list[np.ndarray], np.ndarray]] = [
        ("valid", split.valid_history, split.valid_target),
        ("test", split.test_history, split.test_target),
    ]
    return [
        {
            "model": fitted.model,
            "split": name,
            "excluded": excluded,
            **recall_ndcg(rank(fitted.score, histories, exclude_seen=excluded), targets),
            "users": len(targets),
            "seconds": round(fitted.seconds, 1),
            "seed": fitted.seed,
            "setting": fitted.setting,
        }
        for name, histories, targets in parts
        for excluded in (False, True)
    ]


def run(
    split: Split,
    items: Items,
    models: list[str],
    seeds: list[int],
    sasrec_setting: sasrec.Setting,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All rows; models without chance are fitted once, whatever the number of seeds."""
    rows = []
    for model in models:
        for seed in seeds if model == "sasrec" else seeds[:1]:
            fitted = fit(model, split, items, seed, sasrec_setting, report)
            report(f"{model}: {fitted.seconds:.1f} s, {fitted.setting}")
            rows += rows_of(fitted, split)
    return rows


def main(arguments: list[str]) -> None:
    defaults = sasrec.Setting()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.baselines",
        description="Accuracy of the comparison models on a data folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="a data folder (interactions.csv.gz, ...)")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated; SASRec is trained once per seed")
    parser.add_argument("--sasrec-width", type=int, default=defaults.width, help="width of SASRec's embeddings")
    parser.add_argument("--sasrec-dropout", type=float, default=defaults.dropout, help="SASRec's dropout")
    parser.add_argument("--out", type=result_file, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if unknown := [m for m in models if m not in MODELS]:
        parser.error(f"no model named {unknown[0]!r}: choose from {', '.join(MODELS)}")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds takes whole numbers separated by commas, not {options.seeds!r}")
    setting = sasrec.Setting(width=options.sasrec_width, dropout=options.sasrec_dropout)

    start, code = time.perf_counter(), commit()
    data = read_data(options.data)
    rows = run(leave_one_out(data), data.items, models, seeds, setting, lambda line: print(line, file=sys.stderr))
    command = shlex.join(["python", "-m", "benchmarks.accuracy.baselines", *arguments])
    minutes = round((time.perf_counter() - start) / 60, 2)
    record(options.out, command, seeds, rows, minutes=minutes, data=data.name, protocol=PROTOCOL, **code)
    print(table(rows, ["model", "split", "excluded", *METRICS, "seconds", "seed"]))


if __name__ == "__main__":
    main(sys.argv[1:])
