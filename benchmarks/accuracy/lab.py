"""From questions to rows: trains the arms, measures them, compares them in pairs over the users.

Rows are of the test part. Whatever had to be chosen (steps, weight of the dense score, paths) was chosen on validation.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import arms, hits
from benchmarks.accuracy.arms import ARMS, Place
from benchmarks.accuracy.hits import Ask, Hits
from benchmarks.accuracy.memory import data_of, memory_of, ranks_of
from serving.network.onnx import OnnxRuntime
from serving.search.ranker import BATCH_SIZE
from training.config import RunConfig, read_stored_config
from training.metrics import mean_metrics, ndcg, paired_bootstrap
from training.pipeline import TRAINED, tokenize
from training.stages.loop import load_checkpoint, read_meta
from training.workspace import Workspace

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a table. model: its name there; against: the name of the row it is compared with.

    dense: answered by the dense score alone. users: only these, by their place in the test part. arm: or, of what needs
    no network, its name in `memory.py`.
    """

    model: str
    arm: str
    ask: Ask
    weight: float = 0.0
    against: str = ""
    dense: bool = False
    users: np.ndarray | None = field(default=None, compare=False)
    more: dict[str, Any] = field(default_factory=dict, compare=False)


def at(arm: str, steps: int, **more: Any) -> Cell:
    return Cell(f"{arm}, {steps} steps" if steps else arm, arm, Ask("test", steps), **more)


@dataclass(slots=True)
class Lab:
    place: Place
    seeds: tuple[int, ...]
    validation: list[dict[str, Any]] = field(default_factory=list)  # what choices were made from

    def config(self, arm: str) -> RunConfig:
        return self.place.settings(arm, self.seeds[0])

    def train(self, arm: str) -> None:
        for seed in self.seeds:
            print(f"arm {arm!r}, seed {seed}", file=sys.stderr, flush=True)
            arms.train(self.place, arm, seed, self.more(arm, seed))

    def more(self, arm: str, seed: int) -> tuple[str, ...]:
        """The settings of an arm that follow from what another costs."""
        spec, settings = ARMS[arm], list[str]()
        if spec.grown:
            assert spec.as_costly_as is not None
            settings.append(f"model.d_ff={self.grown_to(spec.as_costly_as, seed)}")
        if spec.as_costly_as:
            other, plain = self.work(spec.as_costly_as, seed), "plain, as costly"
            as_plain = self.place.settings(plain, seed)
            ratio = training_flops(other, "sft", other.config) / training_flops(other, "sft", as_plain)
            settings.append(f"sft.steps={round(other.config.sft.steps * ratio)}")
        return tuple(settings)

    def grown_to(self, arm: str, seed: int) -> int:
        """The d_ff with which a search without steps costs what the arm's deepest search does. FLOPs grow linearly."""
        work, folder = self.work(arm, seed), self.place.folder(arm, seed)
        wanted = search_flops(work, Ask("valid", work.vocabulary.max_steps))
        narrow, wide = work.config.model.d_ff, 1024
        data, split = data_of(self.place)
        config = self.place.settings(arm, seed, (f"model.d_ff={wide}",))
        other = tokenize(data, split, self.place.data, folder, config, self.place.device)
        low, high = (search_flops(one, Ask("valid", 0)) for one in (work, other))
        return narrow + round((wanted - low) * (wide - narrow) / (high - low))

    def work(self, arm: str, seed: int) -> Workspace:
        return _load(self.place, arm, seed, self.place.folder(arm, seed))

    def hits(self, arm: str, ask: Ask) -> list[Hits]:
        """One per seed; measured once, then read back."""
        every = []
        for seed in self.seeds:
            folder = self.place.folder(arm, seed)
            found = hits.kept(folder, ask)
            if found is None:
                work = self.work(arm, seed)
                work.neighbours = memory_of(self.place) if ask.memory else None
                found = hits.measure(work, ask)
                hits.keep(folder, ask, found)
            every.append(found)
        return every

    def ranks(self, cell: Cell) -> np.ndarray:
        """Shape: (seeds, U)."""
        if cell.arm not in ARMS:
            return np.repeat(ranks_of(self.place, cell.arm)[None], len(self.seeds), 0)
        found = self.hits(cell.arm, cell.ask)
        ranks = np.stack([one.dense if cell.dense else one.rank(cell.weight) for one in found])
        return ranks if cell.users is None else ranks[:, cell.users]

    def choose(self, cells: list[Cell]) -> Cell:
        """The best of several on validation (their asks must say so), which is put down."""
        means = []
        for cell in cells:
            value = float(ndcg(self.ranks(cell)).mean())
            means.append(value)
            row = {"model": cell.model, "split": "valid", "steps": cell.ask.steps, "paths": cell.ask.paths}
            row |= {"merge": cell.ask.merge, "dense_weight": cell.weight, "union": cell.ask.union}
            row |= {"memory_weight": cell.ask.memory}
            self.validation.append(row | {"ndcg@10": round(value, 5)})
        return cells[int(np.argmax(means))]

    def best_weight(self, arm: str, steps: int) -> float:
        """The dense score's weight that validation likes best."""
        weights = self.config(arm).evaluation.dense_weights
        return self.choose([Cell(arm, arm, Ask("valid", steps), weight) for weight in weights]).weight

    def rows(self, cells: list[Cell]) -> Rows:
        named = {cell.model: cell for cell in cells}
        return [self.row(cell, named.get(cell.against)) for cell in cells]

    def row(self, cell: Cell, against: Cell | None) -> dict[str, Any]:
        """Means over users and seeds; the gain's interval is a bootstrap over users of their mean over seeds."""
        ranks = self.ranks(cell)
        row = {"model": cell.model, "arm": cell.arm, "split": cell.ask.split, "steps": cell.ask.steps,
               "dense_weight": cell.weight, "memory_weight": cell.ask.memory, "users": ranks.shape[1]}  # fmt: skip
        row |= {name: round(value, 5) for name, value in mean_metrics(ranks).items()} | cell.more
        if against is not None:
            row |= {"against": against.model} | self.gain(ndcg(ranks), ndcg(self.ranks(against)))
        if len(self.seeds) > 1:
            row["spread"] = round(float(ndcg(ranks).mean(1).std(ddof=1)), 5)
        if cell.arm not in ARMS:
            return row
        spent = [arms.minutes(self.place.folder(cell.arm, seed), ARMS[cell.arm].until) for seed in self.seeds]
        return row | {"minutes": round(float(np.mean(spent)), 1)}

    def gain(self, one: np.ndarray, other: np.ndarray) -> dict[str, float]:
        """Of one metric, in its own unit and in percent of the other's mean. Shapes: (seeds, U) both."""
        mean, low, high = paired_bootstrap(one.mean(0), other.mean(0), seed=0)
        gain = {"gain": round(mean, 5), "low": round(low, 5), "high": round(high, 5)}
        return gain | ({"percent": round(100 * mean / other.mean(), 1)} if other.mean() else {})

    def minutes(self, wanted: list[str]) -> float:
        """Training time of some arms; a stage that several share counts once."""
        spent = {}
        for arm, seed in product(wanted, self.seeds):
            folder = self.place.folder(arm, seed)
            for stage in arms.STAGES[: arms.STAGES.index(ARMS[arm].until) + 1]:
                file = folder / f"{stage}.latest.safetensors"
                spent[file.stat().st_ino] = read_meta(file)["seconds"] / 60
        return sum(spent.values())

    def trained_by(self, wanted: list[str]) -> dict[str, Any]:
        """The commit of the code that trained the arms, and on what; each is named where they differ."""
        found = {
            f"{arm}/{seed}": json.loads((self.place.folder(arm, seed) / "trained.json").read_text())
            for arm in wanted
            for seed in self.seeds
        }

        def all_or_each(key: str) -> Any:
            each = {name: code.get(key) for name, code in found.items()}
            return each if len(set(each.values())) > 1 else next(iter(each.values()))

        dirty = any(code["dirty"] for code in found.values())
        return {"trained_dirty": dirty, "trained_by": all_or_each("commit"), "trained_on": all_or_each("on")}


@lru_cache(maxsize=2)
def _load(place: Place, arm: str, seed: int, folder: Any) -> Workspace:
    """An arm with the weights that its last stage liked best."""
    data, split = data_of(place)
    config = read_stored_config(json.loads((folder / "run.json").read_text())["config"])
    work = tokenize(data, split, place.data, folder, config, place.device)
    load_checkpoint(folder / f"{ARMS[arm].until}.best.safetensors", work.network, None)
    work.network.eval()
    return work


def training_flops(work: Workspace, stage: str, config: RunConfig, steps: int = 12) -> float:
    """FLOPs of a training step, forward and backward, a mean over some. Matrix products only, as torch counts them, on
    the meta device, where shapes flow and nothing is computed: a batch made for a GPU would not fit everywhere.
    """
    torch.manual_seed(0)  # draws the lengths
    work = replace(work, config=config, network=copy.deepcopy(work.network)).on("meta")
    step = TRAINED[stage](work, getattr(config, stage))
    with FlopCounterMode(display=False) as counter:
        for number in range(steps):
            step(number)[0].backward()
    return counter.get_total_flops() / steps


@torch.no_grad()
def search_flops(work: Workspace, ask: Ask, count: int = 256) -> float:
    """FLOPs of one user's answer, encoding included. Matrix products only, as torch counts them."""
    histories, _ = hits.users(work, ask.split)
    longest, ranker, beam = work.settings.max_items, work.ranker(), work.config.evaluation.beam
    total, histories = 0.0, sorted(histories[:count], key=lambda history: min(len(history), longest))
    for first in range(0, len(histories), BATCH_SIZE["cpu"]):
        with FlopCounterMode(display=False) as counter:
            ranker.search(ranker.encode(histories[first : first + BATCH_SIZE["cpu"]]), ask.steps, beam)
        total += counter.get_total_flops()
    return total / len(histories)


@torch.no_grad()
def answer_ms(work: Workspace, ask: Ask, count: int = 100) -> float:
    """Median ms of one user's answer by ONNX Runtime, encoding included; the first tenth warms up."""
    histories, _ = hits.users(work, ask.split)
    network, attention = work.network.eval(), work.settings.attention
    runtime = OnnxRuntime(network, work.item_tokens, attention, threads=torch.get_num_threads(), int8=ask.int8)
    ranker, spent = work.ranker(runtime), []
    for history in histories[:count]:
        start = time.perf_counter()
        ranker.search(ranker.encode([history]), ask.steps, work.config.evaluation.beam)
        spent.append(time.perf_counter() - start)
    return 1000 * float(np.median(spent[count // 10 :]))
