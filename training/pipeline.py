"""The whole path, stage after stage in one work folder: prepare, tokenize, pretrain, sft, rl, export.

Every stage leaves its result in the folder and finds the earlier ones there, so the same command resumes a run that was
killed. One run at a time may use the folder, and a folder belongs to one configuration and one data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from serving.bundle import Bundle
from serving.files import atomic_write, check_replaceable, locked_folder
from serving.items.tokenizer import save_tokenizer
from serving.manifest import foreign_to_bundle
from training.config import RunConfig
from training.config_file import ConfigError, read_stored_config
from training.data.feedback import data_folder_of
from training.data.given_ids import GivenIds, given_file, load_given_ids, name_of, unused_note
from training.data.prepare import Split, describe, split_by, statistics, weigh
from training.data.read import Dataset, Items, data_files, folder_name, read_data
from training.evaluate import validate
from training.export import export
from training.ids.embed import item_embedding
from training.ids.semantic_ids import build_semantic_ids
from training.preflight import (
    RunError,
    check_data,
    check_device,
    check_room,
    check_work_folder,
    start_afresh,
    stored_run,
)
from training.refit import TRIAL
from training.stages.begin import begin_reasoning, check_collapse, supervises_reasoning_tokens
from training.stages.distributed import SINGLE_PROCESS, Process, join_processes
from training.stages.loop import Log, Outcome, run_stage
from training.stages.pretrain import PretrainStep
from training.stages.rl import RlStep
from training.stages.sft import SftStep
from training.workspace import Workspace, make_workspace

STAGES = ("prepare", "tokenize", "pretrain", "sft", "rl", "export")
SEMANTIC_IDS = "semantic_ids.safetensors"  # in the work folder, with the embedding that they were made from
TRAINED = {"pretrain": PretrainStep, "sft": SftStep, "rl": RlStep}


def run(
    source: Path | str,
    bundle_folder: Path,
    config: RunConfig,
    until: str = "export",
    work_folder: Path | None = None,
    device: str = "cpu",
) -> None:
    """Runs every stage up to `until` that is not done yet. source: a data folder, or a service's feedback, see
    `data_folder_of`. work_folder: `<bundle>.work` unless given.

    Under torchrun the processes train together; rank 0 locks the folder and does what cannot be divided. Whatever can
    be refused (`training/preflight.py`) is refused before the first stage.
    """
    bundle_folder, folder = check_start(bundle_folder, work_folder, device)
    with ExitStack() as stack:
        process = stack.enter_context(join_processes(device))
        with process.first_goes_ahead():
            if process.is_first:
                stack.enter_context(locked_folder(folder))
            data_folder = data_folder_of(source, folder)
            config = config.model_copy(update={"name": config.name or folder_name(data_folder)})
            # Before the folder is written to, so that bad data leave no trace.
            data = weigh(read_data(data_folder), config.history.type_weights)
            ids_file = None
            if config.tokenizer.kind == "given":
                ids_file = given_file(data_folder, config.given_ids)
                # By name, so that the run stays the same beside further files.
                config = config.model_copy(update={"given_ids": name_of(ids_file)})
            given = read_given_ids(data_folder, config, data.items)
            if given is not None:
                data = replace(data, skipped=data.skipped | given.skipped)
            split = split_by(data, config.split, times=config.model.time_bias)
            check_data(data, split, reads_times=config.model.time_bias, refits=config.refit.epochs > 0)
            if process.is_first:
                begin_run(folder, {"data": fingerprint(data_folder, ids_file), "config": config.to_json()}, data, split)
                if given is None and (note := unused_note(data_folder)):
                    print(note)
            if until == "prepare":
                return
            work = tokenize(data, split, given, folder, config, process.device)
        if until == "tokenize":
            return
        stages = [stage for stage in STAGES[: STAGES.index(until) + 1] if stage in TRAINED]
        check_room(folder, work.network, stages, [TRIAL] if until == "export" and config.refit.epochs else [])
        summary = train(stages, work, folder, process)
        if until == "export" and process.is_first:
            write_version(work, data, folder, bundle_folder, summary)


def check_start(bundle_folder: Path, work_folder: Path | None, device: str) -> tuple[Path, Path]:
    """The absolute folders of bundle and work, if a run may write there; and how many threads torch uses is set."""
    check_device(device)
    bundle_folder = Path(os.path.abspath(bundle_folder))  # "." and ".." have no name, and links stay as they are
    check_replaceable(bundle_folder, foreign_to_bundle, "a bundle")
    folder = work_folder or bundle_folder.with_name(bundle_folder.name + ".work")
    check_work_folder(folder, bundle_folder)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return bundle_folder, folder


def begin_run(folder: Path, wanted: dict[str, Any], data: Dataset, split: Split) -> None:
    """Raises RunError where the work folder belongs to another run; else it belongs to this one."""
    _same_run(folder, wanted)
    print(describe(data, split))
    _write_json(folder / "statistics.json", statistics(data))


def train(
    stages: Sequence[str], work: Workspace, folder: Path, process: Process, continues: bool = False
) -> dict[str, Any]:
    """Runs stages one after the other, and returns a summary of each. continues: see `train_stage`."""
    drawn, held_out = work.config.evaluation.valid_users, len(work.split.valid_target)
    if process.is_first and drawn < held_out:
        print(f"Validation while training is on {drawn:,} of {held_out:,} users, the same every time.")
    with closing(Log(folder, silent=not process.is_first)) as log:
        outcomes = {stage: train_stage(stage, work, folder, log, process, continues) for stage in stages}
    return {
        stage: {"seconds": round(o.seconds, 1), "best_step": o.best_step, **o.best} for stage, o in outcomes.items()
    }


def write_version(
    work: Workspace,
    data: Dataset,
    folder: Path,
    bundle_folder: Path,
    summary: dict[str, Any],
    earlier: Bundle | None = None,
) -> None:
    _write_json(folder / "stages.json", summary)
    version = export(work, data, folder, bundle_folder, summary, earlier)
    print(f"Wrote {bundle_folder} ({version}). Serve it: python -m app serve --bundle {bundle_folder}")


def read_given_ids(data_folder: Path, config: RunConfig, items: Items) -> GivenIds | None:
    """The semantic IDs that the data folder brings along, where the configuration wants them. Raises DataError."""
    if config.tokenizer.kind != "given":
        return None
    given, shared = load_given_ids(given_file(data_folder, config.given_ids), items), config.tokenizer.shared_codebook
    return given if shared is None else replace(given, shared_codebook=shared)


def tokenize(
    data: Dataset,
    split: Split,
    given: GivenIds | None,
    folder: Path,
    config: RunConfig,
    device: torch.device | str = "cpu",
) -> Workspace:
    """Semantic IDs (made once, then read back), and the workspace of all later stages. given: see `read_given_ids`."""
    file = folder / SEMANTIC_IDS
    if not file.exists():
        tokenizer = config.tokenizer
        embedding = item_embedding(data.items, split.train, tokenizer, config.seed, folder / "cache", progress=True)
        with tqdm(desc="tokenize", unit="step", mininterval=1.0) as bar:

            def progress(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.update(0)

            ids = build_semantic_ids(embedding, tokenizer, config.seed, given, progress)
        save_tokenizer(folder / "tokenizer", ids.codec, tokenizer.embedder, ids.report)
        print("Semantic IDs:", json.dumps(ids.report))
        tensors = {
            "codes": torch.from_numpy(ids.codes),
            "embedding": torch.from_numpy(np.ascontiguousarray(embedding.matrix, np.float32)),
        }
        with atomic_write(file) as partial:
            sizes = {"codebook_sizes": json.dumps(ids.codebook_sizes), "shared_levels": str(ids.shared_levels)}
            save_file(tensors, partial, sizes)
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata() or {}
        codebook_sizes = tuple(json.loads(about["codebook_sizes"]))
        shared_levels = int(about.get("shared_levels", 0))  # runs of earlier versions have none
        codes, matrix = stored.get_tensor("codes").numpy(), stored.get_tensor("embedding").numpy()
    return make_workspace(config, split, codes, codebook_sizes, matrix, device, shared_levels)


def train_stage(
    stage: str,
    work: Workspace,
    folder: Path,
    log: Log,
    process: Process = SINGLE_PROCESS,
    continues: bool = False,
) -> Outcome:
    """Runs one of the three stages on `work.network`, which holds the weights of the stage before, or, where the stage
    `continues`, those that it has ended with earlier.

    What stage 2 starts with cannot reason yet, so it does not compete with what it makes, whatever numbers of steps
    validation measures: a run without reasoning would otherwise keep its start where one with it cannot.
    """
    config, sft = work.stage_config(stage), work.config.sft
    starts_to_reason = stage == "sft" and not continues
    if starts_to_reason and sft.apart and sft.steps:
        begin_reasoning(work)
    checked = stage != "pretrain" and sft.entropy_floor and supervises_reasoning_tokens(work)
    check = partial(check_collapse, work, stage, folder) if checked else None
    step, reasons = TRAINED[stage](work, config), stage != "pretrain"
    return run_stage(stage, work.network, config, work.config.seed, folder, step, lambda: validate(work, reasons), log,
                     process, work.config.precision, check, step.kept, start_competes=not starts_to_reason)  # fmt: skip


def fingerprint(data_folder: Path, given: Path | None = None) -> dict[str, str]:
    """sha256 of every data file, given semantic IDs included, to notice data that changed since the run began."""
    digests = {}
    for path in filter(None, (*data_files(data_folder), given)):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _same_run(folder: Path, wanted: dict[str, Any]) -> None:
    file = folder / "run.json"
    if file.exists():
        found = stored_run(file)
        try:
            found["config"] = read_stored_config(found["config"]).to_json()
        except ConfigError as error:
            reason = str(error).rstrip(".")
            raise RunError(
                f"{folder} belongs to a run with settings of another version ({reason}); {start_afresh(folder)}"
            ) from error
        if found != wanted:
            raise RunError(f"{folder} belongs to a run with other data or settings; {start_afresh(folder)}")
    else:
        _write_json(file, wanted)


def _write_json(path: Path, data: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
