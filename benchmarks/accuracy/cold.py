"""Items that nobody had when the model was trained, added by their text: how often does an answer name the right one?

The newest items are taken out of the data, with every user's events from the first such item on. A bundle is trained on
the rest; then the items are added as `PUT /items` adds them, and a user's first event with one of them is what an
answer to the events before it should have found. Items are the newest by their first event; where the data have
positions for times, so many are drawn at random.

A bundle is kept under --work, so the same command goes on after a kill.
"""

from __future__ import annotations

import asyncio
import csv
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from benchmarks.accuracy.full_ranking import TOP, Score, rank
from benchmarks.common import ROOT, argument_parser, commit, record, result_file, table
from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import ServingError
from serving.online.admission import Plan
from serving.online.live_catalogue import LiveCatalogue
from serving.online.query import Query
from serving.online.recommender import recommend_batch
from training.config import RunConfig
from training.config_file import load_config
from training.data.prepare import leave_one_out, sample_users
from training.data.read import Dataset, Items, read_data
from training.ids.embed import embed_text, item_text, keep_embedding
from training.metrics import ndcg, paired_bootstrap, target_ranks
from training.pipeline import run

BEAM, BATCH, WARM_USERS = 50, 64, 2000
SHARES = (2.0, 5.0)  # per cent of the items
EXPLORED = (1, 3)  # slots of ten
SERVED, BEFORE, TEXT = "as served", "before they were added", "nearest text"
COLUMNS = ("held_out", "asked", "catalogue", "model", "users", "recall@1", "recall@10", "recall_low", "recall_high",
           "ndcg@10", "gain", "low", "high", "against")  # fmt: skip
PROTOCOL = (
    "Full ranking, seen items excluded, beam 50, no reasoning. held_out: per cent of the items. asked: `new`, users "
    "whose first held-out item is the target; `known`, the leave-one-out test of the rest. catalogue: what may be "
    "recommended. recall_low, recall_high: 95% Wilson interval of recall@10. gain: of NDCG@10 against the row named in "
    "`against`, with a 95% interval by paired bootstrap over users. Other users' events after the first of a held-out "
    "item stay in training. nearest text: cosine of an item's text and the mean of the history's."
)
Row = dict[str, Any]
Ranking = Callable[[list[np.ndarray]], np.ndarray]  # histories of item rows -> (U, 10) item rows, -1: none


@dataclass(frozen=True, slots=True)
class HeldOut:
    """items: rows that nobody has had in training. users: rows of those whose history ends with one of them, and
    `history` and `target` what they had before it, and it."""

    items: np.ndarray
    history: list[np.ndarray]
    target: np.ndarray


def has_times(data: Dataset) -> bool:
    """Whether events have times, and not their positions in a user's history."""
    positions = np.arange(len(data.sequence)) - np.repeat(data.offsets[:-1], np.diff(data.offsets))
    return not np.array_equal(data.times, positions)


def hold_out(data: Dataset, percent: float, seed: int) -> tuple[HeldOut, list[np.ndarray]]:
    """The newest items and who took them first, and what is left of every user's events."""
    sequences = [data.events(user) for user in range(len(data.user_ids))]
    first = np.full(len(data.items), np.inf)
    np.minimum.at(first, data.sequence, data.times)
    taken = np.flatnonzero(np.isfinite(first))
    tie_break = np.random.default_rng(seed).permutation(len(taken))
    age = -first[taken] if has_times(data) else np.zeros(len(taken))
    items = np.sort(taken[np.lexsort((tie_break, age))][: max(1, round(percent / 100 * len(taken)))])
    is_new = np.zeros(len(data.items), bool)
    is_new[items] = True
    at = [int(is_new[sequence].argmax()) if is_new[sequence].any() else len(sequence) for sequence in sequences]
    rest = [sequence[:end] for sequence, end in zip(sequences, at, strict=True)]
    asked = [user for user, end in enumerate(at) if 0 < end < len(sequences[user])]
    target = np.array([sequences[user][at[user]] for user in asked], np.int64)
    return HeldOut(items, [rest[user] for user in asked], target), rest


def write_rest(folder: Path, data: Dataset, held_out: HeldOut, rest: Sequence[np.ndarray]) -> None:
    """A data folder of what is left: users with two events or more, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "interactions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("user_id", "item_id", "timestamp"))
        for user, sequence in enumerate(rest):
            if len(sequence) > 1:
                times = data.times[data.offsets[user] :]
                rows.writerows(
                    (data.user_ids[user], data.items.item_ids[item], time)
                    for item, time in zip(sequence.tolist(), times.tolist(), strict=False)
                )
    kept = np.setdiff1d(np.arange(len(data.items)), held_out.items)
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries(data.items, kept))


def entries(items: Items, rows: Iterable[int]) -> Iterator[Row]:
    for row in rows:
        yield {
            "item_id": items.item_ids[row],
            "title": items.titles[row],
            "brand": items.brands[row],
            "categories": items.categories[row],
            "description": items.descriptions[row],
        }


def put(engine: Engine, new: Iterable[Row]) -> int:
    """Adds items as `PUT /items` does; returns how many got a semantic ID."""

    async def at_once(work: Callable[[], Any]) -> Any:
        return work()

    async def added() -> int:
        live = LiveCatalogue(engine, at_once)
        always: Row = {"fields": {}, "available_from": None, "available_until": None}
        made = await live.put_entries([item | always for item in new])
        results = await live.apply([entry for entry in made if not isinstance(entry, ServingError)])
        await live.close()
        return sum(isinstance(result, int) for result in results)

    return asyncio.run(added())


def served(engine: Engine, items: Items, **query: Any) -> Ranking:
    """Ranks on the way of a request. Rows are the data's."""
    ids, catalogue = items.item_ids, engine.bundle.catalogue
    to_data = {item_id: row for row, item_id in enumerate(ids)}

    def rank(histories: list[np.ndarray]) -> np.ndarray:
        ranked = np.full((len(histories), TOP), -1, np.int64)
        for first in range(0, len(histories), BATCH):
            batch = histories[first : first + BATCH]
            queries = [Query([ids[row] for row in history], k=TOP, **query) for history in batch]
            for index, found in enumerate(recommend_batch(engine, queries, Plan(0, BEAM)), first):
                ranked[index, : len(found.items)] = [to_data[catalogue.item_ids[row]] for row in found.items]
        return ranked

    return rank


def scored(score: Score, permitted: np.ndarray | None = None) -> Ranking:
    """Ranks by scores of every item. permitted: the rows that may be recommended; None: all."""

    def of_permitted(histories: list[np.ndarray]) -> np.ndarray:
        scores = score(histories)
        if permitted is not None:
            scores[:, np.setdiff1d(np.arange(scores.shape[1]), permitted)] = -np.inf
        return scores

    return lambda histories: rank(of_permitted, histories, exclude_seen=True)


def rows_of(
    histories: list[np.ndarray], target: np.ndarray, rankings: dict[str, tuple[Ranking, str | None]], **same: Any
) -> list[Row]:
    """A row per ranking, compared with the earlier one that it names."""
    rows, ndcgs = list[Row](), dict[str, np.ndarray]()
    for name, (ranking, against) in rankings.items():
        ranks = target_ranks(ranking(histories), target)
        ndcgs[name], hits = ndcg(ranks), int((ranks < TOP).sum())
        interval = binomtest(hits, len(ranks)).proportion_ci(method="wilson")
        figures = {
            "recall@1": (ranks == 0).mean(),
            "recall@10": hits / len(ranks),
            "recall_low": interval.low,
            "recall_high": interval.high,
            "ndcg@10": ndcgs[name].mean(),
        }
        row = same | {"model": name, "users": len(ranks)}
        row |= {metric: round(float(value), 5) for metric, value in figures.items()}
        if against is not None:
            base = ndcgs[against]
            gain, low, high = (round(value, 5) for value in paired_bootstrap(ndcgs[name], base, seed=0))
            row |= {"against": against, "gain": gain, "low": low, "high": high}
        rows.append(row)
    return rows


def measure(data: Dataset, held_out: HeldOut, config: RunConfig, folder: Path) -> list[Row]:
    """All rows of one share of held-out items. folder: holds what is left of the data, and the bundle trained on it."""
    engine = Engine(Bundle.load(folder / "bundle"), threads=torch.get_num_threads())
    left = read_data(folder / "rest")
    split = leave_one_out(left)
    histories, target = sample_users(split.test_history, split.test_target, WARM_USERS)
    row_of = {item_id: row for row, item_id in enumerate(data.items.item_ids)}
    to_data = np.array([row_of[item_id] for item_id in left.items.item_ids])
    known = [to_data[history] for history in histories], to_data[target]
    before = served(engine, data.items)(known[0])
    new = [data.items.item_ids[row] for row in held_out.items]
    added = put(engine, entries(data.items, held_out.items))

    plain = served(engine, data.items)
    explored = {f"explore {n}": (served(engine, data.items, explore=n), SERVED) for n in EXPLORED}
    vectors = embed_text(item_text(data.items), config.tokenizer.embedder, folder.parent / "cache")
    popularity = np.bincount(np.concatenate(split.train), minlength=len(left.items))

    def text(histories: list[np.ndarray]) -> np.ndarray:
        scores: np.ndarray = np.stack([vectors[history].mean(0) for history in histories]) @ vectors.T
        return scores

    def popular(histories: list[np.ndarray]) -> np.ndarray:
        counts = np.zeros(len(data.items), np.float32)
        counts[to_data] = popularity
        return np.tile(counts, (len(histories), 1))

    def chance(histories: list[np.ndarray]) -> np.ndarray:
        return np.random.default_rng(0).random((len(histories), len(data.items)), np.float32)

    def network(**query: Any) -> Ranking:
        return served(engine, data.items, neighbours_weight=0.0, **query)

    rows = rows_of(*known, {
        BEFORE: (lambda _: before, None), SERVED: (plain, BEFORE), **explored,
    }, asked="known", catalogue="all")  # fmt: skip
    first = held_out.history, held_out.target
    rows += rows_of(*first, {
        SERVED: (plain, None), **explored, "network alone": (network(), SERVED),
        TEXT: (scored(text), SERVED), "popularity": (scored(popular), SERVED),
    }, asked="new", catalogue="all")  # fmt: skip
    rows += rows_of(*first, {
        SERVED: (served(engine, data.items, allow=new), None), "network alone": (network(allow=new), SERVED),
        TEXT: (scored(text, held_out.items), SERVED), "chance": (scored(chance, held_out.items), SERVED),
    }, asked="new", catalogue="held-out items")  # fmt: skip
    return [{"items": len(new), "added": added} | row for row in rows]


def train(data: Dataset, held_out: HeldOut, rest: Sequence[np.ndarray], config: RunConfig, folder: Path) -> float:
    """Trains a bundle on what is left, unless it is there. Returns the minutes it took."""
    file = folder / "minutes.json"
    if not file.exists():
        began = time.perf_counter()
        write_rest(folder / "rest", data, held_out, rest)
        run(folder / "rest", folder / "bundle", config, until="prepare")  # makes it a run's own folder
        texts, left = item_text(data.items), np.setdiff1d(np.arange(len(data.items)), held_out.items)
        keep_embedding([texts[row] for row in left], config.tokenizer.embedder, folder / "bundle.work" / "cache",
                       embed_text(texts, config.tokenizer.embedder, folder.parent / "cache")[left])  # fmt: skip
        run(folder / "rest", folder / "bundle", config)
        file.write_text(json.dumps((time.perf_counter() - began) / 60))
    return float(json.loads(file.read_text()))


def main(arguments: list[str]) -> None:
    parser = argument_parser("benchmarks.accuracy.cold", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="a data folder with item texts")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "cold.yaml")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, help="folder of what is trained; default: runs/cold-NAME")
    parser.add_argument("--out", type=result_file, help="default: benchmarks/results/cold-NAME.json")
    options = parser.parse_args(arguments)
    data, config, code = read_data(options.data), load_config(options.config, options.set), commit()
    work, rows, minutes = options.work or ROOT / "runs" / f"cold-{data.name}", list[Row](), 0.0
    for percent in SHARES:
        held_out, rest = hold_out(data, percent, config.seed)
        folder = work / f"{percent:g}"
        minutes += train(data, held_out, rest, config, folder)
        began = time.perf_counter()
        rows += [{"held_out": percent} | row for row in measure(data, held_out, config, folder)]
        minutes += (time.perf_counter() - began) / 60
    out = options.out or ROOT / f"benchmarks/results/cold-{data.name}.json"
    command = shlex.join(["python", "-m", "benchmarks.accuracy.cold", *arguments])
    record(out, command, [config.seed], rows, minutes=round(minutes, 1), data=data.name, protocol=PROTOCOL,
           newest=has_times(data), **code)  # fmt: skip
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
