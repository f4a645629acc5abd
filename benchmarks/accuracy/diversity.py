"""What lists that are more diverse cost in accuracy, and what they bring: a row per setting of a request.

    python -m benchmarks.accuracy.diversity --bundle BUNDLE --data DIR

The leave-one-out test of a data set, on the way of a request. `length` is the mean length of a list, which a limit per
category may cut short; `categories` the mean number of different ones in it; `similarity` the mean cosine of two of its
items; `coverage` the share of the catalogue that is in any list.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.cold import Ranking, Row, rows_of, served
from benchmarks.common import ROOT, argument_parser, commit, record, result_file, table
from serving.bundle import Bundle
from serving.engine import Engine
from training.data.prepare import leave_one_out, sample_users
from training.data.read import Dataset, read_data

PLAIN = "plain"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    **{f"diversity {value}": {"diversity": value} for value in (0.1, 0.2, 0.3, 0.5, 0.8)},
    **{f"at most {count} per category": {"max_per_category": count} for count in (5, 3, 1)},
}
COLUMNS = ("model", "users", "recall@10", "ndcg@10", "gain", "low", "high", "length", "categories", "similarity",
           "coverage")  # fmt: skip
PROTOCOL = (
    "Leave-one-out, test, seen items excluded, 10 items from 50 beams, no reasoning, the bundle's own join. gain: of "
    "NDCG@10 against plain, with a 95% interval by paired bootstrap over users."
)


def measure(bundle: Bundle, data: Dataset, users: int) -> list[Row]:
    """users: how many are asked, 0 for all."""
    engine, split = Engine(bundle, threads=torch.get_num_threads()), leave_one_out(data)
    histories, target = sample_users(split.test_history, split.test_target, users or len(split.test_target))
    lists = {name: served(engine, data.items, **query)(histories) for name, query in SETTINGS.items()}
    found = {name: (_always(ranked), None if name == PLAIN else PLAIN) for name, ranked in lists.items()}
    rows = rows_of(histories, target, found)
    return [row | of_lists(bundle, data, ranked) for row, ranked in zip(rows, lists.values(), strict=True)]


def _always(ranked: np.ndarray) -> Ranking:
    return lambda histories: ranked


def of_lists(bundle: Bundle, data: Dataset, ranked: np.ndarray) -> Row:
    """ranked: (U, 10) item rows of the data, -1 where a list has ended."""
    ids = data.items.item_ids
    lists = [[row for row in found if row >= 0] for found in ranked.tolist()]
    categories, similarity = [], []
    for found in lists:
        rows = [row for row in bundle.catalogue.rows([ids[row] for row in found]) if row is not None]
        categories.append(len({name for row in rows for name in bundle.catalogue.categories[row]}))
        if len(rows) > 1:
            vectors = bundle.unit_vectors(rows)
            similarity.append((float(np.square(vectors.sum(0)).sum()) - len(rows)) / (len(rows) * (len(rows) - 1)))
    figures = {
        "length": np.mean([len(found) for found in lists]),
        "categories": np.mean(categories),
        "similarity": np.mean(similarity) if similarity else 0.0,
        "coverage": len(set().union(*lists)) / len(bundle.catalogue),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def main(arguments: list[str]) -> None:
    parser = argument_parser("benchmarks.accuracy.diversity", __doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the data folder it was trained on")
    parser.add_argument("--users", type=int, default=0, help="how many are asked; 0: all (%(default)s)")
    parser.add_argument("--out", type=result_file, help="default: benchmarks/results/diversity-NAME.json")
    options = parser.parse_args(arguments)
    code, began = commit(), time.perf_counter()
    bundle, data = Bundle.load(options.bundle), read_data(options.data)
    rows = measure(bundle, data, options.users)
    out = options.out or ROOT / f"benchmarks/results/diversity-{data.name}.json"
    command = shlex.join(["python", "-m", "benchmarks.accuracy.diversity", *arguments])
    minutes = round((time.perf_counter() - began) / 60, 1)
    record(out, command, [0], rows, minutes=minutes, data=data.name, protocol=PROTOCOL, **code)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
