"""What is trained: an arm is a run with some settings changed, and arms that agree up to a stage share that stage.

A folder per arm, `WORK/seed-S/ARM`, in the form of `training.pipeline`. Before an arm trains, the stages in which it
does not differ from a finished one are linked from there: training is what is scarce, and a difference between two arms
should not be that of two stage-1 models.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from benchmarks.common import commit, machine
from training.config import ConfigError, RunConfig, load_config, read_stored_config
from training.pipeline import run
from training.stages.loop import read_meta

Stage = Literal["pretrain", "sft", "rl"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft", "rl")
DEPTH = 4  # the number of steps at which ways of thinking are compared
SLOW = f"l = {DEPTH}"  # the arm of the whole method, which most are held against
LENGTHS = (0, 2, 4, 6, 8, 12)
OWN = (4, 2, 8)  # numbers of steps with a checkpoint of their own, the one that others share first
NO_MEMORY = ("neighbours.enabled=false", "evaluation.neighbours_weights=[0]")  # an arm is a network; see `memory.py`
NO_THOUGHT = ("lengths=[0]", "evaluation.steps=[0]")
REWARDS = ("format", "match", "similarity", "likelihood", "rank")


@dataclass(frozen=True, slots=True)
class Arm:
    """until: its last stage; what comes later is switched off. as_costly_as: another arm, whose training FLOPs in stage
    2 this arm's number of steps is made to match. grown: d_ff, to what that other arm costs at inference."""

    until: Stage = "sft"
    settings: tuple[str, ...] = ()
    as_costly_as: str | None = None
    grown: bool = False


def trained_for(steps: int, *settings: str) -> Arm:
    return Arm("sft", (f"lengths=[{steps}]", f"evaluation.steps=[0,{steps}]", *settings))


def rewarded(*settings: str) -> Arm:
    return Arm("rl", (f"lengths=[{DEPTH}]", f"evaluation.steps=[0,{DEPTH}]", *settings))


ARMS: dict[str, Arm] = {
    # stage 1, which is a plain TIGER
    "plain": Arm("pretrain", ("evaluation.steps=[0]",)),
    "random ids": Arm("pretrain", ("evaluation.steps=[0]", "tokenizer.kind=random")),
    "given ids": Arm("pretrain", ("evaluation.steps=[0]", "tokenizer.kind=given")),
    "plain, shared codes": Arm("pretrain", ("evaluation.steps=[0]", "model.reasoning_codes=0")),
    "similar items": Arm("pretrain", ("evaluation.steps=[0]", "pretrain.similar_weight=0.5")),
    # stage 2: the method for one number of steps, and for all of them
    "every l": Arm("sft", ("evaluation.steps=[0,4,12]",)),
    **{f"l = {steps}": trained_for(steps) for steps in OWN},
    # stage 2 without thinking
    "plain, as costly": Arm("sft", (*NO_THOUGHT, "sft.state_weight=0"), as_costly_as=SLOW),
    "plain, grown": Arm("sft", (*NO_THOUGHT, "sft.state_weight=0"), as_costly_as=SLOW, grown=True),
    "state loss alone": Arm("sft", NO_THOUGHT),
    # other thoughts of the same number
    "token alone": trained_for(DEPTH, "model.step_form=token"),
    "pause": trained_for(DEPTH, "model.step_form=token", "sft.labels=pause"),
    "random": trained_for(
        DEPTH, "model.step_form=token", "sft.labels=random", "sft.inputs=label", "sft.reasoning_weight=0"
    ),
    "state alone": trained_for(DEPTH, "model.step_form=state"),
    "latent": trained_for(DEPTH, "model.step_form=state", "sft.state_weight=0"),
    # stage 2 with one loss taken out, put in, or exchanged
    "no labels": trained_for(DEPTH, "sft.reasoning_weight=0", "sft.quantization_weight=0"),
    "no quantization": trained_for(DEPTH, "sft.quantization_weight=0"),
    "no state loss": trained_for(DEPTH, "sft.state_weight=0"),
    "no direct answer": trained_for(DEPTH, "sft.plain_weight=0"),
    "in-batch contrast": trained_for(DEPTH, "sft.state_loss=contrastive"),
    "preference": trained_for(DEPTH, "sft.preference_weight=0.5"),
    "labels as input": trained_for(DEPTH, "sft.inputs=label"),
    "similar items, then stage 2": trained_for(DEPTH, "pretrain.similar_weight=0.5"),
    "distilled": trained_for(DEPTH, "sft.distillation_weight=1"),
    # stage 2 with an open choice made otherwise
    "shared codes": trained_for(DEPTH, "model.reasoning_codes=0"),  # on a stage 1 of its own: the vocabulary differs
    "more reasoning weight": trained_for(DEPTH, "sft.reasoning_weight=1"),
    # stage 3
    "rl": rewarded(),
    "rl, anchor alone": rewarded("rl.policy_weight=0"),
    **{f"rl, no {name}": rewarded(f"rl.{name}_reward=0") for name in REWARDS},
    "rl, no labels": rewarded("sft.reasoning_weight=0", "sft.quantization_weight=0"),
    "rl, group of 16": rewarded("rl.group=16"),
    "rl, rate of 3e-5": rewarded("rl.lr=3e-5"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where arms lie, from what settings they start, and what computes: "cpu" or "cuda"."""

    data: Path
    work: Path
    config: Path | None
    overrides: tuple[str, ...]
    device: str = "cpu"

    def folder(self, arm: str, seed: int) -> Path:
        return self.work / f"seed-{seed}" / arm.replace(" ", "-").replace(",", "").replace(":", "").replace("=-", "")

    def settings(self, arm: str, seed: int, more: tuple[str, ...] = ()) -> RunConfig:
        """The run of an arm. more: what `as_costly_as` and `grown` come to."""
        until = ARMS[arm].until
        later = [f"{stage}.steps=0" for stage in STAGES[STAGES.index(until) + 1 :]]
        given = next(iter(sorted((self.data / "semantic_ids").glob("*.json.gz"))), None)
        ids = [f"given_ids={given.name.removesuffix('.json.gz')}"] if arm == "given ids" and given else []
        overrides = [*self.overrides, *NO_MEMORY, *ARMS[arm].settings, *ids, *later, *more, f"seed={seed}"]
        return load_config(self.config, overrides)


def train(place: Place, arm: str, seed: int, more: tuple[str, ...] = ()) -> None:
    """Trains an arm, or what is missing of it; `trained.json` in its folder says with which code and on what.

    Raises RunError where the folder holds the arm with other settings.
    """
    folder, config = place.folder(arm, seed), place.settings(arm, seed, more)
    if (folder / "trained.json").exists() and shares(_settings_of(folder), config, ARMS[arm].until):
        return
    folder.mkdir(parents=True, exist_ok=True)
    code = commit()
    inherit(folder, config, ARMS[arm].until)
    run(place.data, folder, config, until=ARMS[arm].until, work_folder=folder, device=place.device)
    hardware = machine()
    (folder / "trained.json").write_text(json.dumps(code | {"on": hardware["gpu"] or hardware["cpu"]}))


def _settings_of(folder: Path) -> RunConfig:
    return read_stored_config(json.loads((folder / "run.json").read_text())["config"])


def inherit(folder: Path, config: RunConfig, until: Stage) -> None:
    """Links from other arms of the same seed the longest row of finished stages that an arm's settings share."""
    caches = [other for other in folder.parent.glob("*/cache") if other.parent != folder]
    if caches and not (folder / "cache").exists():  # reading the items' text takes minutes
        shutil.copytree(caches[0], folder / "cache")
    others = [path.parent for path in sorted(folder.parent.glob("*/run.json")) if path.parent != folder]
    known = {}
    for other in others:
        with suppress(ConfigError):  # of a version whose settings are no longer supported
            known[other] = _settings_of(other)
    for stage in STAGES[: STAGES.index(until) + 1]:
        if (folder / f"{stage}.latest.safetensors").exists():
            continue
        ancestors = [
            other
            for other, settings in known.items()
            if shares(settings, config, stage) and finished(other, stage, config)
        ]
        if not ancestors:
            return
        names = [f"{stage}.best.safetensors", f"{stage}.latest.safetensors"]
        if stage == "pretrain" and not (folder / "semantic_ids.safetensors").exists():
            shutil.copytree(ancestors[0] / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
            names.append("semantic_ids.safetensors")
        for name in names:
            os.link(ancestors[0] / name, folder / name)  # files appear anew and whole, so none is changed in place


def shares(first: RunConfig, second: RunConfig, stage: Stage) -> bool:
    """Whether two runs are the same up to and with a stage."""
    return _up_to(first, stage) == _up_to(second, stage)


def _up_to(config: RunConfig, stage: Stage) -> dict[str, Any]:
    every = {name: value for name, value in config.to_json().items() if name not in ("name", "licence")}
    for inference in ("paths", "merge"):
        del every["model"][inference]
    for later in ("choice_users", "dense_weights", "neighbours_weights", "dense_candidates"):
        del every["evaluation"][later]
    del every["neighbours"]
    if stage != "rl":
        del every["rl"]
    if stage == "pretrain":  # knows no thoughts, and is judged by l = 0 alone
        del every["sft"], every["lengths"], every["model"]["step_form"], every["evaluation"]["steps"]
    return every


def finished(folder: Path, stage: Stage, config: RunConfig) -> bool:
    try:
        return read_meta(folder / f"{stage}.latest.safetensors")["step"] == getattr(config, stage).steps
    except (FileNotFoundError, SafetensorError):
        return False


def minutes(folder: Path, until: Stage) -> float:
    """Training time of an arm, its ancestors included."""
    stages = STAGES[: STAGES.index(until) + 1]
    return sum(read_meta(folder / f"{stage}.latest.safetensors")["seconds"] for stage in stages) / 60
