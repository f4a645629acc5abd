"""The demo bundle on its shop: every number of steps beside what is simple and what is best possible.

python -m benchmarks.accuracy.demo --data runs/demo/shop
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.baselines import fit
from benchmarks.accuracy.sasrec import Setting
from benchmarks.common import ROOT, commit, rank, record, table
from serving.bundle import Bundle
from training.data.prepare import leave_one_out, read_data
from training.evaluate import evaluate_bundle
from training.metrics import recall_ndcg

COLUMNS = ["model", "steps", "recall@5", "recall@10", "ndcg@5", "ndcg@10"]
BEAM = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.demo", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/demo/shop"), help="the bundle's shop")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    options = parser.parse_args()
    code, started = commit(), time.perf_counter()
    data, bundle = read_data(options.data), Bundle.load(options.bundle)
    split = leave_one_out(data)
    rows: list[dict[str, Any]] = []
    for model in ("popularity", "neighbours"):
        fitted = fit(model, split, data.items, 0, Setting(), print)
        ranked = rank(fitted.score, split.test_history, exclude_seen=True)
        rows.append({"model": model, **recall_ndcg(ranked, split.test_target)})
    for row in evaluate_bundle(bundle, data, range(bundle.max_steps + 1), "test", BEAM, 0, exclude_seen=True):
        rows.append({"model": "demo bundle", **row})
    best = json.loads((options.data / "truth.json").read_text())["best"]
    rows.append({"model": "best possible", **best})
    print(table(rows, COLUMNS))
    record(ROOT / "benchmarks/results/demo.json", "python -m benchmarks.accuracy.demo", [0], rows,
           minutes=round((time.perf_counter() - started) / 60, 1), version=bundle.version,
           protocol="Shop of 20,000 users and 1,000 items, leave-one-out, test, seen items excluded, beam 50.",
           **code)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
