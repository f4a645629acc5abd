"""What a run refuses before it starts, because it would otherwise find out hours later, or harm what is not its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.errors import StorageError
from serving.files import PARTIAL
from serving.online.changelog import CHANGES_FILE
from serving.types import MAX_TIMESTAMP
from training.data.errors import DataError
from training.data.feedback import SNAPSHOT
from training.data.prepare import Split
from training.data.read import Dataset

RUN = "run.json"
LEAST_JUDGES = 2  # of one user nobody can say what is more than chance
SINCE_1973 = 1e8  # seconds since 1970: order numbers and years are less
# What a run that was killed at once leaves: texts already embedded, what a service had recorded, how its items changed.
# Any of them may be half-written.
UNUSED = {"lock", "cache", SNAPSHOT, CHANGES_FILE}


class RunError(RuntimeError):
    """The work folder does not fit the command; the message says what to do."""


def check_device(device: str) -> None:
    """Raises RunError for a GPU that is not there, or that this build of torch cannot use."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda needs a GPU and a build of torch that can use it; install one or leave it out.")


def check_work_folder(folder: Path, bundle_folder: Path) -> None:
    """Raises RunError where the folder for checkpoints and logs holds files of others."""
    if folder.resolve().is_relative_to(bundle_folder.resolve()):
        raise RunError(f"{folder}, with the checkpoints, lies in the bundle's folder; choose another --out or --work.")
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in names if name.removesuffix(PARTIAL) not in {RUN, *UNUSED}]
        if foreign and RUN not in names:
            raise RunError(
                f"{folder} holds {foreign[0]} and no training run, and this run would keep its files there; choose "
                "another --out, or move that away."
            )
    elif folder.exists():
        raise RunError(f"{folder} is a file, where this run would keep its checkpoints; choose another --out.")


def stored_run(file: Path) -> dict[str, Any]:
    """What run.json says of the run that a work folder belongs to. Raises RunError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise RunError(f"{file} is damaged, or not of a training run; {start_afresh(file.parent)}")
    return found


def start_afresh(folder: Path) -> str:
    """How to train with other settings or data than those the work folder belongs to, as the end of a sentence."""
    return f"choose another --out or remove {folder}."


def check_data(
    data: Dataset, split: Split, *, reads_times: bool = False, refits: bool = False, compares: bool = False
) -> None:
    """Raises DataError for data that can be read and not learnt from or evaluated on.

    reads_times: whether the model reads when events were, as a service will be told in seconds. refits: whether it
    learns from the validation events in the end. compares: whether test events compare it with an earlier one.
    """
    if len(data.items) < 2:
        raise DataError(f"{data.name} has a single item, so there is nothing to choose from; add items.")
    if max(map(len, split.train)) < 2:
        raise DataError(
            f"{data.name} has no user with two events for training, so no item follows another; add longer histories."
        )
    if len(split.valid_target) < LEAST_JUDGES:
        raise DataError(
            f"{data.name} has a single user to evaluate on, and the settings of a bundle are chosen on two or more; "
            "add users with at least 3 events."
        )
    if refits and len(split.valid_target) < 2 * LEAST_JUDGES:
        raise DataError(
            f"{data.name} has {len(split.valid_target)} users to evaluate on, and refit.epochs needs "
            f"{2 * LEAST_JUDGES}, to learn from one half and judge by the other; add users with at least 3 events, or "
            "set refit.epochs=0."
        )
    if compares and len(split.test_target) < LEAST_JUDGES:
        raise DataError(
            f"{data.name} has a single user with a test event, and an update is compared with the earlier bundle on "
            "two or more; add users with at least 3 events."
        )
    if reads_times and not SINCE_1973 <= float(np.median(data.times)) <= MAX_TIMESTAMP:
        raise DataError(
            f"{data.name} does not count its times in seconds since 1970, as model.time_bias needs; write them so, or "
            "as dates, or leave model.time_bias out."
        )


def check_room(folder: Path, network: torch.nn.Module, stages: Sequence[str], unvalidated: Sequence[str] = ()) -> None:
    """Raises StorageError if the disk cannot hold what the stages are certain to leave there.

    That is, per stage, the best weights and the latest ones with two moments of the optimiser; what an earlier run has
    left of them is there already. unvalidated: further stages, which know no best weights.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    present = sum(
        file.stat().st_size
        for stage in (*stages, *unvalidated)
        for file in folder.glob(f"{stage}.*.safetensors")
        if file.is_file()
    )
    missing = (4 * len(stages) + 3 * len(unvalidated)) * weights - present
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise StorageError(
            f"The disk under {folder} has {free / 1e6:,.1f} MB left and this run writes {missing / 1e6:,.1f} MB or "
            "more; free some space and run the same command again."
        )
