"""How training grows with the catalogue: time and peak memory of every part of a run, from data to bundle.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.fitting

For every size data are generated (`write_data`), with about `--events` events for each item, and trained on with few
steps: what a step costs is measured, not what is learnt. Texts are not embedded, which takes each as long as the other,
and evaluations are of a few hundred users, for whom they take as long in any catalogue. Every part runs in a process of
its own, whose peak memory is the part's, and resumes what the part before has left:

    read    reads and checks the data and splits them; all parts begin with it, and their time is without it
    ids     embeddings from behaviour, quantized to semantic IDs, and what all stages share
    stages  three stages of `--steps` steps each, with two evaluations
    export  chooses the defaults, measures, and writes the bundle, without a memory
    memory  fits the counted item memory; what is similar follows from the embeddings of `ids`

`growth` is the time since the size before, with as many events for each item, divided by how much n log n has grown,
n items: up to 1 a part grows no faster than linearly times a logarithm. The result is written after every size, so that
a run that is stopped keeps those it has measured.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from benchmarks.common import ROOT, Run, argument_parser, table
from benchmarks.engine.constraint import sizes
from training.config import RunConfig
from training.config_file import load_config
from training.data.prepare import split_by
from training.data.read import Items, read_data
from training.memory import fit_memory
from training.pipeline import SEMANTIC_IDS, run

SEED = 0
PARTS = {"read": "prepare", "ids": "tokenize", "stages": "rl", "export": "export"}  # and the stage that ends each
SETTINGS = ("tokenizer.source=collaborative", "evaluation.valid_users=100", "evaluation.choice_users=500",
            "evaluation.dense_weights=[0]", "neighbours.parts=counted")  # fmt: skip
COLUMNS = ["items", "events", "part", "seconds", "growth", "peak_gib"]
MIN_EVENTS, MEAN_EVENTS = 5, 10  # of a user
CLUSTER, LOYALTY = 100, 0.8  # items of a cluster, and the share of events within it
CHUNK = 100_000  # users generated at a time

Row = dict[str, Any]


def main() -> None:
    parser = argument_parser("benchmarks.engine.fitting", __doc__)
    parser.add_argument("--items", type=sizes, default="1e4,1e5,1e6", help="catalogue sizes (%(default)s)")
    parser.add_argument("--events", type=sizes, default="10,20", help="for each item (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of each stage (%(default)s)")
    parser.add_argument("--set", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fitting.json")
    options = parser.parse_args()
    settings = [*SETTINGS, *(f"{stage}.steps={options.steps}" for stage in ("pretrain", "sft", "rl"))]
    settings += [f"{stage}.eval_every={options.steps}" for stage in ("pretrain", "sft", "rl")]
    config = load_config(None, [*settings, *(options.set or [])])
    result, rows = Run(parser, options), list[Row]()
    for events in options.events:
        smaller: list[Row] = []
        for items in options.items:
            smaller = with_growth(list(measure(items, events, config)), smaller)
            print(table(smaller, COLUMNS), flush=True)
            rows += smaller
            result.record(options.out, [SEED], rows)


def measure(items: int, events_per_item: int, config: RunConfig) -> Iterator[Row]:
    """A row per part. What is read is read again by every part, and its time taken off."""
    with TemporaryDirectory() as folder:
        data, bundle = Path(folder) / "shop", Path(folder) / "bundle"
        events = write_data(data, items * events_per_item // MEAN_EVENTS, items)
        read = 0.0
        for part in (*PARTS, "memory"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                took, peak = child.submit(_part, part, data, bundle, config).result()
            own = took if part == "memory" else took - read
            read = read or took
            yield {"items": items, "events": events, "part": part, "seconds": round(own, 2), "peak_gib": peak}


def write_data(folder: Path, users: int, items: int) -> int:
    """Writes a data folder in time that grows with the events, and returns their number.

    A user's events are in one cluster of items, drawn at random, and with 1 - LOYALTY anywhere. The items of a cluster
    are as popular as Zipf says.
    """
    rng = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"item_id": "p{row}", "title": "item {row}"}}\n' for row in range(items))
    names = pa.array([f"p{row}" for row in rng.permutation(items)])
    popularity = 1 / np.arange(1, CLUSTER + 1)
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    events = 0
    with pq.ParquetWriter(folder / "interactions.parquet", schema) as writer:
        for first in range(0, users, CHUNK):
            user = np.arange(first, min(first + CHUNK, users))
            lengths = MIN_EVENTS + rng.poisson(MEAN_EVENTS - MIN_EVENTS, len(user))
            cluster, count = np.repeat(rng.integers(0, -(-items // CLUSTER), len(user)), lengths), lengths.sum()
            within = cluster * CLUSTER + rng.choice(CLUSTER, count, p=popularity / popularity.sum())
            loyal = (rng.random(count) < LOYALTY) & (within < items)
            item = np.where(loyal, within, rng.integers(0, items, count))
            columns = [np.repeat(user, lengths).astype(str), names.take(pa.array(item)), np.arange(count)]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema))
            events += int(count)
    return events


def _part(part: str, data: Path, bundle: Path, config: RunConfig) -> tuple[float, float]:
    """Seconds, and peak memory in GiB."""
    began = time.perf_counter()
    if part == "memory":
        dataset = read_data(data)
        nothing: list[str | None] = [None] * len(dataset.items)
        without_text = Items(dataset.items.item_ids, nothing, nothing, [[] for _ in nothing], nothing)
        split = split_by(dataset, config.split)
        embedding = load_file(bundle.with_name(bundle.name + ".work") / SEMANTIC_IDS)["embedding"]
        began = time.perf_counter()  # what reading takes is known
        fit_memory(without_text, split, config, behaviour=embedding)
    else:
        run(data, bundle, config, PARTS[part])
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return took, round(peak, 2)


def with_growth(found: list[Row], smaller: list[Row]) -> list[Row]:
    """Adds `growth` to the rows of a size, where there is a smaller one."""
    before = {row["part"]: row for row in smaller}
    for row in found:
        if (last := before.get(row["part"])) and last["seconds"] > 0:
            allowed = row["items"] / last["items"] * math.log(row["items"], last["items"])
            row["growth"] = round(row["seconds"] / last["seconds"] / allowed, 2)
    return found


if __name__ == "__main__":
    main()
