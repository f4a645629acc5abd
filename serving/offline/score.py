"""Offline scoring: recommendations for every history of a file, by the engine that serves.

    histories --part by part--> OUT.parts/part-000000.parquet, …  --once all are there--> OUT

A part appears complete or not at all, so that a run that was killed resumes at the first missing part, and no user is
lost or scored twice. Rows that cannot be answered go to OUT.rejects.jsonl and never stop a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import ScoreError
from serving.files import atomic_write, check_writable, locked_folder
from serving.offline.input import Part, Reject, open_histories
from serving.offline.scorer import SCHEMA, Scorer, Task


@dataclass(frozen=True, slots=True)
class Summary:
    """users: all answered ones; popular: those among them who got popular items, because none of theirs is known.

    rejected: rows that could not be answered.
    """

    users: int
    popular: int
    rejected: int


# Scores parts, in any order, and yields the number of rows done from time to time
RunParts = Callable[[Task, Bundle, Sequence[Part]], Iterator[int]]


def score(task: Task, run_parts: RunParts | None = None) -> Summary:
    """Scores what is not scored yet, then joins all parts to task.out.

    Raises ScoreError, BundleError, StorageError or FolderInUse, each in one sentence; call it again once that is fixed.
    """
    bundle = Bundle.load(task.bundle)
    _check_options(task, bundle)
    _check_out(task)
    parts = open_histories(task.histories, task.part_users).parts()
    with locked_folder(task.parts_folder):
        _check_same_run(task, bundle)
        missing = [part for part in parts if not _is_done(task, part)]
        total = sum(part.rows for part in parts)
        progress = Progress(total, total - sum(part.rows for part in missing))
        for rows in (run_parts or run_here)(task, bundle, missing):
            progress.add(rows)
        summary = _join_parts(task, parts)
        _remove_parts(task.parts_folder)
    return summary


def run_here(task: Task, bundle: Bundle, parts: Sequence[Part], threads: int = 1) -> Iterator[int]:
    """Scores parts in this process."""
    scorer = Scorer(task, Engine(bundle, runtime=task.runtime, threads=threads))
    for part in parts:
        yield from scorer.score(part)


class Progress:
    """Prints how far the run is and the time left: one line on a terminal, else a line every `every` seconds."""

    def __init__(self, total: int, done: int, every: float = 10.0) -> None:
        self.total, self.done, self.done_now = total, done, 0
        self.terminal = sys.stderr.isatty()
        self.every = 0.5 if self.terminal else every
        self.started = self.shown = time.monotonic()
        if done:
            print(f"{done:,} of {total:,} users are already scored", file=sys.stderr)

    def add(self, rows: int) -> None:
        self.done, self.done_now = self.done + rows, self.done_now + rows
        now = time.monotonic()
        if now - self.shown < self.every and self.done < self.total:
            return
        self.shown = now
        rate = max(self.done_now, 1) / max(now - self.started, 1e-9)
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        line = f"scored {self.done:,} of {self.total:,} ({self.done / self.total:.1%}), {rate:,.0f} users/s, "
        line += f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        end = "\r" if self.terminal and self.done < self.total else "\n"
        print(line.ljust(78), end=end, file=sys.stderr, flush=True)


def _check_options(task: Task, bundle: Bundle) -> None:
    if not 1 <= task.k <= task.beam:
        raise ScoreError(f"--k must be in 1..{task.beam}, the beam width; increase --beam or lower --k.")
    if task.steps is not None and not 0 <= task.steps <= bundle.max_steps:
        raise ScoreError(f"--steps must be in 0..{bundle.max_steps}, the range of this bundle.")
    if min(task.batch, task.part_users) < 1:
        raise ScoreError("--batch and --part-users must be at least 1.")


OWN_FILE = re.compile(r"lock|(run\.json|part-\d{6,}\.(parquet|rejects\.jsonl))(\..*partial)?")  # of OUT.parts
REJECT_FIELDS = {field.name for field in fields(Reject)}


def _check_out(task: Task) -> None:
    """Raises ScoreError where scoring would replace a file that no earlier scoring wrote, or could write none."""
    for path, is_ours in ((task.out, _is_result), (task.rejects_file, _is_rejects)):
        if path.exists() and os.path.samefile(path, task.histories):
            raise ScoreError(f"{path} is the file of histories, which would be replaced; choose another --out.")
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_ours(path)):
            raise ScoreError(f"{path} exists and is not an earlier result; choose another --out, or move it away.")
    if task.out.resolve().is_relative_to(task.bundle.resolve()):
        raise ScoreError(f"{task.out} lies in the bundle, which holds its own files alone; choose another --out.")
    folder = task.parts_folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ScoreError(f"{folder} is not a folder, in which this run would keep its parts; choose another --out.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign or (names and "lock" not in names):
        raise ScoreError(
            f"{folder} holds {(foreign or names)[0]}, which no earlier run left there; choose another --out, or move "
            "that away."
        )
    check_writable(folder)


def _is_result(path: Path) -> bool:
    """Whether a file is empty, or Parquet with the columns that scoring writes."""
    try:
        return path.stat().st_size == 0 or bool(pq.read_schema(path).equals(SCHEMA))
    except (OSError, pa.ArrowException):
        return False


def _is_rejects(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    try:
        return not first or set(json.loads(first)) == REJECT_FIELDS
    except (ValueError, TypeError, RecursionError):
        return False


def _remove_parts(folder: Path) -> None:
    """Removes what scoring wrote to OUT.parts, and the folder unless somebody else has put something there."""
    (folder / "run.json").unlink()  # first: without it a later run ignores the parts
    for path in folder.iterdir():
        if OWN_FILE.fullmatch(path.name) and path.name != "lock":
            path.unlink()
    (folder / "lock").unlink()  # last: a folder with parts and no lock is not ours
    with suppress(OSError):
        folder.rmdir()


def _check_same_run(task: Task, bundle: Bundle) -> None:
    """Keeps parts of a run with other histories, bundle or options from being mixed with those of this one."""
    with task.histories.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    steps = bundle.default_steps if task.steps is None else task.steps
    this_run = {"histories": digest, "bundle": bundle.version, "k": task.k, "beam": task.beam, "steps": steps,
                "exclude_seen": task.exclude_seen, "part_users": task.part_users, "runtime": task.runtime}  # fmt: skip
    file_of_run = task.parts_folder / "run.json"
    if file_of_run.exists():
        try:
            earlier = json.loads(file_of_run.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            earlier = None
        if earlier != this_run:
            raise ScoreError(
                f"{task.parts_folder} belongs to a run with other histories, bundle or options; "
                "choose another --out or remove that folder."
            )
    else:
        for stale in task.parts_folder.glob("part-*"):  # all ours, see `_check_out`
            stale.unlink()
        with atomic_write(file_of_run) as path:
            path.write_text(json.dumps(this_run) + "\n", encoding="utf-8")


def _is_done(task: Task, part: Part) -> bool:
    """A part that cannot be opened, for example after a disk error, is scored again."""
    try:
        answered = pq.read_metadata(task.part_file(part.number)).num_rows
    except (OSError, pa.ArrowException):
        return False
    return bool(answered + len(_rejects(task, part)) == part.rows)


def _rejects(task: Task, part: Part) -> list[str]:
    path = task.part_rejects(part.number)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _join_parts(task: Task, parts: Sequence[Part]) -> Summary:
    """Writes OUT and its rejects from all parts, in the order of the histories, one part in memory at a time."""
    users = popular = rejected = 0
    with atomic_write(task.rejects_file) as path, path.open("w", encoding="utf-8") as rejects:
        for part in parts:
            lines = _rejects(task, part)
            rejects.writelines(line + "\n" for line in lines)
            rejected += len(lines)
    if not rejected:
        task.rejects_file.unlink()
    with atomic_write(task.out) as path, pq.ParquetWriter(path, SCHEMA) as writer:
        for part in parts:
            table = pq.read_table(task.part_file(part.number))
            users += len(table)
            popular += table["source"].to_pylist().count("popularity")
            writer.write_table(table)
    return Summary(users, popular, rejected)
