"""The demo bundle at every number of reasoning steps, compared with simpler models and with the best possible ranking.

    python -m benchmarks.accuracy.demo

All are evaluated on the shop that the bundle was trained on, which is written to `runs/demo/shop` where it is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.baselines import fit
from benchmarks.accuracy.full_ranking import rank
from benchmarks.accuracy.sasrec import Setting
from benchmarks.common import ROOT, commit, record, table
from serving.bundle import Bundle
from training.data.prepare import leave_one_out
from training.data.read import read_data
from training.data.shop import write_demo_shop
from training.evaluate import evaluate_bundle
from training.metrics import recall_ndcg

SHOP = ROOT / "runs/demo/shop"
COLUMNS = ["model", "steps", "recall@5", "recall@10", "ndcg@5", "ndcg@10"]
BASELINES = ("popularity", "neighbours", "neighbours+text")
BEAM = 50
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    options = parser.parse_args()
    code, started = commit(), time.perf_counter()
    write_demo_shop(SHOP)
    data, bundle = read_data(SHOP), Bundle.load(options.bundle)
    split = leave_one_out(data)
    rows: list[dict[str, Any]] = []
    for model in BASELINES:
        fitted = fit(model, split, data.items, SEED, Setting(), print)
        ranked = rank(fitted.score, split.test_history, exclude_seen=True)
        rows.append({"model": model, **recall_ndcg(ranked, split.test_target), "setting": fitted.setting})
    for row in evaluate_bundle(bundle, data, range(bundle.max_steps + 1), "test", BEAM, 0, exclude_seen=True):
        rows.append({"model": "demo bundle", **row})
    best = json.loads((SHOP / "truth.json").read_text())["best"]
    rows.append({"model": "best possible", **best})
    print(table(rows, COLUMNS))
    record(
        ROOT / "benchmarks/results/demo.json",
        f"python -m benchmarks.accuracy.demo --bundle {options.bundle}",
        [SEED],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        version=bundle.version,
        protocol=f"Shop of {len(data.user_ids):,} users and {len(data.items):,} items, leave-one-out, test, "
        f"seen items excluded, beam {BEAM}.",
        **code,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
