"""From variants to rows: trains variants, measures them, and compares them over the same users.

Rows are of the test part. What has to be chosen (steps, the dense score's weight, paths) is chosen on validation.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.costs import search_flops, training_flops
from benchmarks.accuracy.item_graph import data_of, memory_of, ranks_of
from benchmarks.accuracy.ranks import (
    Inference,
    TargetRanks,
    evaluation_users,
    gain_over,
    load_ranks,
    measure_ranks,
    save_ranks,
)
from benchmarks.accuracy.variants import LENGTHS, OWN, SLOW, STAGES, VARIANTS, Setup, train_variant, training_minutes
from training.config import RunConfig
from training.config_file import read_stored_config
from training.join import Join, fit_join
from training.metrics import mean_metrics, ndcg
from training.pipeline import read_given_ids, tokenize
from training.stages.loop import load_checkpoint, read_meta
from training.workspace import Workspace

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a table. model: its name there; against: the name of the row it is compared with.

    variant: or, of what needs no network, its name in `item_graph.py`. dense: answered by the dense score alone. users:
    only these, as positions in the test part.
    """

    model: str
    variant: str
    inference: Inference
    weight: float = 0.0
    against: str = ""
    dense: bool = False
    users: np.ndarray | None = field(default=None, compare=False)
    more: dict[str, Any] = field(default_factory=dict, compare=False)


def at(variant: str, steps: int, **more: Any) -> Cell:
    return Cell(f"{variant}, {steps} steps" if steps else variant, variant, Inference("test", steps), **more)


@dataclass(slots=True)
class Ablation:
    """Trained variants of one data folder, and what is measured of them. Everything is kept, and done once."""

    setup: Setup
    seeds: tuple[int, ...]
    validation: list[dict[str, Any]] = field(default_factory=list)  # what choices were made from

    def config(self, variant: str) -> RunConfig:
        return self.setup.settings(variant, self.seeds[0])

    def lengths(self, asked: Sequence[int] = LENGTHS) -> list[int]:
        """Of some numbers of steps those that `model.max_steps` permits."""
        return [length for length in asked if length <= self.config(SLOW).model.max_steps]

    def permits(self, variant: str) -> bool:
        """Whether the data hold the codes, and `model.max_steps` permits the steps, that a variant needs."""
        if variant == "given ids":
            return (self.setup.data / "semantic_ids").exists()
        return variant not in [f"l = {length}" for length in OWN if length not in self.lengths(OWN)]

    def train(self, variant: str) -> None:
        for seed in self.seeds:
            print(f"variant {variant!r}, seed {seed}", file=sys.stderr, flush=True)
            train_variant(self.setup, variant, seed, self.more(variant, seed))

    def more(self, variant: str, seed: int) -> tuple[str, ...]:
        """The settings of a variant that follow from what another one costs."""
        spec, settings = VARIANTS[variant], list[str]()
        if spec.grown:
            assert spec.as_costly_as is not None
            settings.append(f"model.d_ff={self.grown_to(spec.as_costly_as, seed)}")
        if spec.as_costly_as:
            other, plain = self.work(spec.as_costly_as, seed), "plain, as costly"
            as_plain = self.setup.settings(plain, seed)
            ratio = training_flops(other, "sft", other.config) / training_flops(other, "sft", as_plain)
            settings.append(f"sft.steps={round(other.config.sft.steps * ratio)}")
        return tuple(settings)

    def grown_to(self, variant: str, seed: int) -> int:
        """The d_ff with which a search without steps costs what the variant's deepest one does: FLOPs grow linearly."""
        work, folder = self.work(variant, seed), self.setup.folder(variant, seed)
        wanted = search_flops(work, Inference("valid", work.vocabulary.max_steps))
        narrow, wide = work.config.model.d_ff, 1024
        data, split = data_of(self.setup)
        config = self.setup.settings(variant, seed, (f"model.d_ff={wide}",))
        given = read_given_ids(self.setup.data, config, data.items)
        other = tokenize(data, split, given, folder, config, self.setup.device)
        low, high = (search_flops(one, Inference("valid", 0)) for one in (work, other))
        return narrow + round((wanted - low) * (wide - narrow) / (high - low))

    def work(self, variant: str, seed: int) -> Workspace:
        return _load(self.setup, variant, seed, self.setup.folder(variant, seed))

    def target_ranks(self, variant: str, inference: Inference) -> list[TargetRanks]:
        """One per seed; measured once, then read back."""
        every = []
        for seed in self.seeds:
            folder = self.setup.folder(variant, seed)
            found = load_ranks(folder, inference)
            if found is None:
                work = self.work(variant, seed)
                if inference.mixed:
                    memory, settings = memory_of(self.setup).whole, self.join(variant, seed).settings
                    work = replace(work, neighbours=memory, settings=settings)
                found = measure_ranks(work, inference)
                save_ranks(folder, inference, found)
            every.append(found)
        return every

    def join(self, variant: str, seed: int) -> Join:
        """How validation joins a variant's answer without steps with the item memory."""
        return _join(self.setup, variant, seed, self.setup.folder(variant, seed))

    def ranks(self, cell: Cell) -> np.ndarray:
        """Shape: (seeds, U)."""
        if cell.variant not in VARIANTS:
            return np.repeat(ranks_of(self.setup, cell.variant)[None], len(self.seeds), 0)
        found = self.target_ranks(cell.variant, cell.inference)
        ranks = np.stack([one.dense if cell.dense else one.rank(cell.weight) for one in found])
        return ranks if cell.users is None else ranks[:, cell.users]

    def choose(self, cells: list[Cell]) -> Cell:
        """The best of several by validation NDCG@10, which is recorded. Their `inference.split` must be valid."""
        means = []
        for cell in cells:
            value = float(ndcg(self.ranks(cell)).mean())
            means.append(value)
            row = {"model": cell.model, "split": "valid", "steps": cell.inference.steps, "paths": cell.inference.paths}
            row |= {"merge": cell.inference.merge, "dense_weight": cell.weight, "union": cell.inference.union}
            self.validation.append(row | {"ndcg@10": round(value, 5)})
        return cells[int(np.argmax(means))]

    def best_weight(self, variant: str, steps: int) -> float:
        """The dense score's weight with the best validation NDCG@10."""
        weights = self.config(variant).evaluation.dense_weights
        return self.choose([Cell(variant, variant, Inference("valid", steps), weight) for weight in weights]).weight

    def rows(self, cells: list[Cell]) -> Rows:
        """A row per cell; `same_checkpoint_as` names the first row of another variant that has the very same weights,
        as where a stage kept those it began with.
        """
        named, first = {cell.model: cell for cell in cells}, dict[tuple[str, ...], Cell]()
        rows = []
        for cell in cells:
            row, weights = self.row(cell, named.get(cell.against)), self.checkpoints(cell.variant)
            if weights and (same := first.setdefault(weights, cell)).variant != cell.variant:
                row["same_checkpoint_as"] = same.model
            rows.append(row)
        return rows

    def checkpoints(self, variant: str) -> tuple[str, ...]:
        """What identifies the weights of a variant, one per seed; nothing for what has none."""
        if variant not in VARIANTS:
            return ()
        return tuple(_digest(self.setup.folder(variant, seed) / best_file(variant)) for seed in self.seeds)

    def is_same(self, one: Cell, other: Cell) -> bool:
        """Whether two cells are one measurement: the same weights, used in the same way."""
        if self.checkpoints(one.variant) != self.checkpoints(other.variant) or one.variant not in VARIANTS:
            return one.variant == other.variant and one.inference == other.inference
        used = [(cell.inference, cell.weight, cell.dense, None if cell.users is None else cell.users.tobytes())
                for cell in (one, other)]  # fmt: skip
        return used[0] == used[1]

    def row(self, cell: Cell, against: Cell | None) -> dict[str, Any]:
        """Means over users and seeds; the gain's interval is a bootstrap over users of their mean over seeds."""
        ranks = self.ranks(cell)
        row = {
            "model": cell.model,
            "arm": cell.variant,  # what recorded results call it
            "split": cell.inference.split,
            "steps": cell.inference.steps,
            "dense_weight": cell.weight,
            "users": ranks.shape[1],
        }
        row |= {name: round(value, 5) for name, value in mean_metrics(ranks).items()} | cell.more
        if against is not None:
            row["against"] = against.model
            if not self.is_same(cell, against):  # nothing gains over itself, and no interval says how little
                row |= gain_over(ndcg(ranks).mean(0), ndcg(self.ranks(against)).mean(0))
        if len(self.seeds) > 1:
            row["spread"] = round(float(ndcg(ranks).mean(1).std(ddof=1)), 5)
        if cell.variant not in VARIANTS:
            return row
        spent = [
            training_minutes(self.setup.folder(cell.variant, seed), VARIANTS[cell.variant].until) for seed in self.seeds
        ]
        return row | {"minutes": round(float(np.mean(spent)), 1)}

    def minutes(self, wanted: list[str]) -> float:
        """Training time of some variants; a stage that several share counts once."""
        spent = {}
        for variant, seed in product(wanted, self.seeds):
            folder = self.setup.folder(variant, seed)
            for stage in STAGES[: STAGES.index(VARIANTS[variant].until) + 1]:
                file = folder / f"{stage}.latest.safetensors"
                spent[file.stat().st_ino] = read_meta(file)["seconds"] / 60
        return sum(spent.values())

    def checks(self, wanted: list[str]) -> Rows:
        """What says whether an arm acts: the step of its best weights, 0 for those it began with, and at these, over
        validation users, the entropy of the first and last step's tokens in nats and the codes' mean cosine."""
        rows = []
        for variant, seed in ((variant, seed) for variant in wanted for seed in self.seeds):
            folder, until = self.setup.folder(variant, seed), VARIANTS[variant].until
            meta = read_meta(folder / f"{until}.latest.safetensors")
            row = {
                "model": variant,
                "seed": seed,
                "stage": until,
                "trained": meta["step"],
                "best_step": meta["best_step"],
            }
            entropies = [value for name, value in meta["best"].items() if name.startswith("entropy/")]
            if entropies:
                row |= {"entropy_first": round(entropies[0], 3), "entropy_last": round(entropies[-1], 3)}
                row["codes_cosine"] = round(meta["best"]["codes/cosine"], 3)
            rows.append(row)
        return rows

    def trained_by(self, wanted: list[str]) -> dict[str, Any]:
        """The commit of the code that trained the variants, and on what; each is named where they differ."""
        found = {
            f"{variant}/{seed}": json.loads((self.setup.folder(variant, seed) / "trained.json").read_text())
            for variant in wanted
            for seed in self.seeds
        }

        def all_or_each(key: str) -> Any:
            each = {name: code.get(key) for name, code in found.items()}
            return each if len(set(each.values())) > 1 else next(iter(each.values()))

        dirty = any(code["dirty"] for code in found.values())
        return {"trained_dirty": dirty, "trained_by": all_or_each("commit"), "trained_on": all_or_each("on")}


def best_file(variant: str) -> str:
    return f"{VARIANTS[variant].until}.best.safetensors"


@lru_cache(maxsize=256)
def _digest(path: Path) -> str:
    """sha256 of a checkpoint's file, which holds its weights and nothing of when or how they were made."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=2)
def _load(setup: Setup, variant: str, seed: int, folder: Any) -> Workspace:
    """A variant with the weights that its last stage liked best."""
    data, split = data_of(setup)
    config = read_stored_config(json.loads((folder / "run.json").read_text())["config"])
    given = read_given_ids(setup.data, config, data.items)
    work = tokenize(data, split, given, folder, config, setup.device)
    load_checkpoint(folder / best_file(variant), work.network, None)
    work.network.eval()
    return work


@lru_cache(maxsize=8)
def _join(setup: Setup, variant: str, seed: int, folder: Any) -> Join:
    work = _load(setup, variant, seed, folder)
    histories, target = evaluation_users(work, "valid")
    beam, candidates = work.config.evaluation.beam, work.config.neighbours.candidates
    return fit_join(work.ranker(), memory_of(setup), histories, target, beam, candidates, exclude_seen=False)
