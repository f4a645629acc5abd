"""The trees and networks that views are compared on: made, trained and searched once, and kept under a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy.ranks import evaluation_users
from benchmarks.accuracy.variants import SEEN_PERMITTED, Setup, share_cache
from benchmarks.accuracy.views import MERGES, Lists, find_lists, merge, training_step, views_of
from benchmarks.common import commit
from serving.files import atomic_write, locked_folder
from training.config import RunConfig
from training.config_file import load_config
from training.data.prepare import split_by
from training.data.read import read_data
from training.evaluate import validate
from training.metrics import target_ranks
from training.pipeline import read_given_ids, run, tokenize
from training.stages.loop import Log, load_checkpoint, read_meta, run_stage
from training.workspace import Workspace

SOURCES = ("both", "text", "both")  # of each tree's codes; tree n is tokenized with the run's seed + n


class Network(NamedTuple):
    """What is trained: on which trees, from which seed, for how many steps over all of them."""

    trees: tuple[int, ...]
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"trees-{''.join(map(str, self.trees))}-seed-{self.seed}-steps-{self.steps}"


class Member(NamedTuple):
    """A network that answers through one of its trees."""

    network: Network
    tree: int


@dataclass(frozen=True)
class Networks:
    """Networks and what they answer, kept under the setup's work folder, so that the same command goes on."""

    setup: Setup

    @cached_property
    def trees(self) -> list[Workspace]:
        """Every tree, made once; none of their networks is used."""
        data = read_data(self.setup.data)
        works = []
        for number, source in enumerate(SOURCES):
            seed = self.config("pretrain.steps=0").seed + number
            config = self.config("pretrain.steps=0", f"seed={seed}", f"tokenizer.source={source}")
            folder = self.setup.work / f"tree-{number}-seed-{seed}"
            self._own(folder, config)
            share_cache(folder)
            split = split_by(data, config.split)
            given = read_given_ids(self.setup.data, config, data.items)
            works.append(tokenize(data, split, given, folder, config, self.setup.device))
        return works

    def config(self, *more: str) -> RunConfig:
        plain = ("pretrain.similar_weight=0", "sft.steps=0", "rl.steps=0", "evaluation.steps=[0]")
        return load_config(self.setup.config, [*self.setup.overrides, *SEEN_PERMITTED, *plain, *more])

    def train(self, network: Network) -> None:
        """Trains a network, or what is missing of it, and keeps the weights that its views like best on average."""
        folder, views = self.folder(network), self.views(network)
        self._own(folder, views[0].config)

        def evaluate() -> dict[str, float]:
            found = {f"ndcg@10/{tree}": validate(view, reasons=False)["score"]
                     for tree, view in zip(network.trees, views, strict=True)}  # fmt: skip
            return found | {"score": float(np.mean(list(found.values())))}

        with locked_folder(folder), closing(Log(folder)) as log:
            if not (folder / "trained.json").exists():
                (folder / "trained.json").write_text(json.dumps(commit()))
            first = views[0]
            run_stage("pretrain", first.network, first.config.pretrain, first.config.seed, folder,
                      training_step(views), evaluate, log, precision=first.config.precision)  # fmt: skip

    def views(self, network: Network) -> list[Workspace]:
        """A fresh network, as a view for each of its trees."""
        config = self.config(f"seed={network.seed}", f"pretrain.steps={network.steps}")
        return views_of([self.trees[tree] for tree in network.trees], config)

    def folder(self, network: Network) -> Path:
        return self.setup.work / network.name

    def minutes(self, networks: Iterable[Network]) -> float:
        """Their training time; a network that is named twice counts once."""
        folders = {self.folder(network) for network in networks}
        return sum(read_meta(folder / "pretrain.latest.safetensors")["seconds"] for folder in folders) / 60

    def lists(self, member: Member, split: str, beam: int, excluded: bool) -> Lists:
        """What a member answers to the users of a split, searched once."""
        folder = self.folder(member.network)
        file = folder / "lists" / f"tree-{member.tree}-{split}-beam-{beam}-excluded-{excluded}.npz"
        if file.exists():
            with np.load(file) as stored:
                return Lists(**stored)
        views = self.views(member.network)
        load_checkpoint(folder / "pretrain.best.safetensors", views[0].network, None)
        view = views[member.network.trees.index(member.tree)]
        found = find_lists(view, self.users(split)[0], beam, excluded)
        with atomic_write(file) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **asdict(found))
        return found

    def users(self, split: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Histories and targets."""
        return evaluation_users(self.trees[0], split)

    def ranks(self, members: list[Member], form: str, split: str, beam: int, excluded: bool) -> np.ndarray:
        """Where members put each user's target together. Shape: (U,)."""
        lists = [self.lists(member, split, beam, excluded) for member in members]
        items = len(self.trees[0].item_tokens)
        return target_ranks(merge(lists, MERGES[form], items), self.users(split)[1])

    def trained_by(self, networks: Iterable[Network]) -> dict[str, Any]:
        """The commit that trained; where networks were trained by different ones, each is named."""
        found = {one.name: json.loads((self.folder(one) / "trained.json").read_text()) for one in networks}
        commits = {name: code["commit"] for name, code in found.items()}
        head = {"trained_dirty": any(code["dirty"] for code in found.values())}
        return head | {"trained_by": commits if len(set(commits.values())) > 1 else next(iter(commits.values()))}

    def best_step(self, member: Member) -> int:
        """The step at which a member was best on validation; 0: before it was trained."""
        entries = map(json.loads, (self.folder(member.network) / "log.jsonl").read_text(encoding="utf-8").splitlines())
        scores = {int(entry["step"]): entry[f"ndcg@10/{member.tree}"] for entry in entries if "score" in entry}
        return max(scores, key=lambda step: scores[step])

    def _own(self, folder: Path, config: RunConfig) -> None:
        """Makes the folder that of these settings. Raises RunError where it has others."""
        run(self.setup.data, folder / "bundle", config, until="prepare", work_folder=folder)
