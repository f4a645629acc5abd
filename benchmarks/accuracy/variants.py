"""What is trained: a variant is a run with some settings changed; variants that agree up to a stage share that stage.

A folder per variant, `WORK/seed-S/VARIANT`, in the form of `training.pipeline`. Before a variant trains, the stages in
which it does not differ from a finished one are linked from there: that saves training, and keeps the noise of a second
stage 1 out of comparisons of stage 2.
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
from training.config import RunConfig
from training.config_file import ConfigError, load_config, read_stored_config
from training.pipeline import run
from training.stages.loop import read_meta

Stage = Literal["pretrain", "sft", "rl"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft", "rl")
DEPTH = 4  # the number of steps at which forms of reasoning are compared
SLOW = f"l = {DEPTH}"  # the variant of the whole method, with which most are compared
LENGTHS = (0, 2, 4, 6, 8, 12)
OWN = (4, 2, 8)  # numbers of steps with a checkpoint of their own, the one that others share first
NO_GRAPH = ("neighbours.enabled=false",)  # see `item_graph.py`
SEEN_PERMITTED = ("evaluation.exclude_seen=false",)  # choices are made as the rows are measured
NO_REASONING = ("lengths=[0]", "evaluation.steps=[0]")
PACKED = ("evaluation.steps=[0]", "model.attention=causal-by-item", "model.age_bias=true", "model.end_token=false",
          "pretrain.state_weight=1", "pretrain.similar_weight=0")  # fmt: skip
REWARDS = ("format", "match", "similarity", "likelihood", "rank")


@dataclass(frozen=True, slots=True)
class Variant:
    """until: its last stage; later ones are switched off.

    as_costly_as: another variant, whose training FLOPs in stage 2 this one's number of steps is made to match.
    grown: d_ff is chosen so that an answer costs as much as that other variant's.
    """

    until: Stage = "sft"
    settings: tuple[str, ...] = ()
    as_costly_as: str | None = None
    grown: bool = False


def trained_for(steps: int, *settings: str) -> Variant:
    return Variant("sft", (f"lengths=[{steps}]", f"evaluation.steps=[0,{steps}]", *settings))


def rewarded(*settings: str) -> Variant:
    return Variant("rl", (f"lengths=[{DEPTH}]", f"evaluation.steps=[0,{DEPTH}]", *settings))


VARIANTS: dict[str, Variant] = {
    # stage 1, which is a plain TIGER
    "plain": Variant("pretrain", ("evaluation.steps=[0]",)),
    "random ids": Variant("pretrain", ("evaluation.steps=[0]", "tokenizer.kind=random")),
    "given ids": Variant("pretrain", ("evaluation.steps=[0]", "tokenizer.kind=given")),
    "plain, shared codes": Variant("pretrain", ("evaluation.steps=[0]", "model.reasoning_codes=0")),
    "similar items": Variant("pretrain", ("evaluation.steps=[0]", "pretrain.similar_weight=0.5")),
    "packed": Variant("pretrain", PACKED),
    "packed, with times": Variant("pretrain", (*PACKED, "model.time_bias=true")),
    # stage 2: the method for one number of steps, and for all of them
    "every l": Variant("sft", (f"evaluation.steps=[0,{DEPTH}]",)),
    **{f"l = {steps}": trained_for(steps) for steps in OWN},
    # stage 2 without reasoning
    "plain, as costly": Variant("sft", (*NO_REASONING, "sft.state_weight=0"), as_costly_as=SLOW),
    "plain, grown": Variant("sft", (*NO_REASONING, "sft.state_weight=0"), as_costly_as=SLOW, grown=True),
    "state loss alone": Variant("sft", NO_REASONING),
    # as many steps of another kind
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
class Setup:
    """The data, the folder of all variants, the settings they start from, and the device: "cpu" or "cuda"."""

    data: Path
    work: Path
    config: Path | None
    overrides: tuple[str, ...]
    device: str = "cpu"

    def folder(self, variant: str, seed: int) -> Path:
        return (
            self.work / f"seed-{seed}" / variant.replace(" ", "-").replace(",", "").replace(":", "").replace("=-", "")
        )

    def settings(self, variant: str, seed: int, more: tuple[str, ...] = ()) -> RunConfig:
        """The run of a variant. more: what `as_costly_as` and `grown` come to."""
        until = VARIANTS[variant].until
        later = [f"{stage}.steps=0" for stage in STAGES[STAGES.index(until) + 1 :]]
        given = next(iter(sorted((self.data / "semantic_ids").glob("*.json.gz"))), None)
        ids = [f"given_ids={given.name.removesuffix('.json.gz')}"] if variant == "given ids" and given else []
        overrides = [*self.overrides, *NO_GRAPH, *SEEN_PERMITTED, *VARIANTS[variant].settings, *ids, *later, *more]
        return load_config(self.config, [*overrides, f"seed={seed}"])


def train_variant(setup: Setup, variant: str, seed: int, more: tuple[str, ...] = ()) -> None:
    """Trains a variant, or what is missing of it; `trained.json` in its folder says with which code and on what.

    Raises RunError where the folder holds the variant with other settings.
    """
    folder, config = setup.folder(variant, seed), setup.settings(variant, seed, more)
    if (folder / "trained.json").exists() and shares(_settings_of(folder), config, VARIANTS[variant].until):
        return
    code, until = commit(), VARIANTS[variant].until
    run(setup.data, folder / "bundle", config, until="prepare", work_folder=folder)  # makes it a run's own folder
    inherit(folder, config, until)
    run(setup.data, folder / "bundle", config, until=until, work_folder=folder, device=setup.device)
    hardware = machine()
    (folder / "trained.json").write_text(json.dumps(code | {"on": hardware["gpu"] or hardware["cpu"]}))


def _settings_of(folder: Path) -> RunConfig:
    return read_stored_config(json.loads((folder / "run.json").read_text())["config"])


def inherit(folder: Path, config: RunConfig, until: Stage) -> None:
    """Links the finished stages that the settings share with another variant of the same seed, as many as there are."""
    share_cache(folder)
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
            os.link(ancestors[0] / name, folder / name)  # files appear anew and whole, so none is changed in setup


def share_cache(folder: Path) -> None:
    """Copies the items' embedded texts from another run beside it, for embedding takes minutes."""
    caches = [other for other in folder.parent.glob("*/cache") if other.parent != folder]
    if caches and not (folder / "cache").exists():
        shutil.copytree(caches[0], folder / "cache")


def shares(first: RunConfig, second: RunConfig, stage: Stage) -> bool:
    """Whether two runs are the same up to and with a stage."""
    return _up_to(first, stage) == _up_to(second, stage)


def _up_to(config: RunConfig, stage: Stage) -> dict[str, Any]:
    every = {name: value for name, value in config.to_json().items() if name not in ("name", "licence")}
    for inference in ("paths", "merge"):
        del every["model"][inference]
    for later in ("choice_users", "dense_weights", "dense_candidates"):
        del every["evaluation"][later]
    del every["neighbours"]
    if stage != "rl":
        del every["rl"]
    if stage == "pretrain":  # does not reason, and is judged by l = 0 alone
        del every["sft"], every["lengths"], every["model"]["step_form"], every["evaluation"]["steps"]
    return every


def finished(folder: Path, stage: Stage, config: RunConfig) -> bool:
    try:
        return bool(read_meta(folder / f"{stage}.latest.safetensors")["step"] == getattr(config, stage).steps)
    except (FileNotFoundError, SafetensorError):
        return False


def training_minutes(folder: Path, until: Stage) -> float:
    """Training time of a variant, its ancestors included."""
    stages = STAGES[: STAGES.index(until) + 1]
    return sum(read_meta(folder / f"{stage}.latest.safetensors")["seconds"] for stage in stages) / 60
