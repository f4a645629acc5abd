"""What a run refuses before it starts, because it would otherwise find out hours later, or harm what is not its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.files import check_writable
from training.data.prepare import DataError, Dataset, Split

RUN = "run.json"
UNUSED = {"lock", f"{RUN}.partial"}  # what a run that was killed at once leaves


class RunError(RuntimeError):
    """The work folder does not fit the command; the message says what to do."""


def check_work_folder(folder: Path) -> None:
    """Raises RunError where a folder for checkpoints and logs holds files of others, StorageError where none fit."""
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.name not in UNUSED)
        if names and RUN not in names:
            raise RunError(
                f"{folder} holds {names[0]} and no training; choose another --out, for this run would keep its files "
                "there, or move that away."
            )
    elif folder.exists():
        raise RunError(f"{folder} is a file, where this run would keep its checkpoints; choose another --out.")
    check_writable(folder)


def stored_run(file: Path) -> dict[str, Any]:
    """What run.json says of the run that a work folder belongs to. Raises RunError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise RunError(f"{file} is damaged, or not of a training; choose another --out or remove that folder.")
    return found


def check_data(data: Dataset, split: Split) -> None:
    """Raises DataError for data that can be read and not learnt from or evaluated on."""
    if len(data.items) < 2:
        raise DataError(f"{data.name} has a single item, so there is nothing to choose from; add items.")
    if len(split.valid_target) < 2:
        raise DataError(
            f"{data.name} has a single user to evaluate on, and the settings of a bundle are chosen on two or more; "
            "add users with at least 3 events."
        )
