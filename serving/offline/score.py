"""Offline scoring: every history of a file to its recommendations, by the engine that serves.

    histories --part by part--> OUT.parts/part-00000.parquet, …  --all there--> OUT

A part appears whole or not at all, so a run that was killed anywhere goes on at the first part that is missing, and no
user is lost or doubled. Rows that cannot be answered are set aside in OUT.rejects.jsonl and never stop a run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import ScoreError
from serving.files import atomic_write, locked_folder
from serving.offline.input import Part, Reject, User, open_histories
from serving.online.admission import Plan
from serving.online.recommender import Query, recommend_batch
from serving.types import RuntimeName

SCHEMA = pa.schema([
    ("user_id", pa.string()),
    ("items", pa.list_(pa.string())),
    ("scores", pa.list_(pa.float32())),
    ("source", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)  # without slots: the command line reads the defaults
class Task:
    """What is to be scored, and how. steps None: the bundle's default. part_users: what a kill can cost, at most."""

    bundle: Path
    histories: Path
    out: Path
    k: int = 10
    beam: int = 50
    steps: int | None = None
    exclude_seen: bool = True
    batch: int = 32
    part_users: int = 4096
    runtime: RuntimeName = "onnx"

    @property
    def parts_folder(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    @property
    def rejects_file(self) -> Path:
        return self.out.with_name(self.out.name + ".rejects.jsonl")

    def part_file(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:06d}.parquet"

    def part_rejects(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:06d}.rejects.jsonl"


@dataclass(frozen=True, slots=True)
class Summary:
    """users: answered ones, `popular` of them by popularity (no item of theirs is known). rejected: rows set aside."""

    users: int
    popular: int
    rejected: int


# Scores parts, in any order, and gives the rows done from time to time
RunParts = Callable[[Task, Bundle, Sequence[Part]], Iterator[int]]


def score(task: Task, run_parts: RunParts | None = None) -> Summary:
    """Scores what is not scored yet, then puts the parts together as task.out.

    Raises ScoreError, BundleError, StorageError, FolderInUse, each in one sentence; run it again once that is mended.
    """
    bundle = Bundle.load(task.bundle)
    _check(task, bundle)
    parts = open_histories(task.histories, task.part_users).parts()
    with locked_folder(task.parts_folder):
        _same_run(task, bundle)
        missing = [part for part in parts if not _is_done(task, part)]
        total = sum(part.rows for part in parts)
        progress = Progress(total, total - sum(part.rows for part in missing))
        for rows in (run_parts or run_here)(task, bundle, missing):
            progress.add(rows)
        summary = _assemble(task, parts)
        (task.parts_folder / "run.json").unlink()  # first: what lies there from now on belongs to no run
        shutil.rmtree(task.parts_folder)
    return summary


def run_here(task: Task, bundle: Bundle, parts: Sequence[Part], threads: int = 1) -> Iterator[int]:
    """Scores parts in this process."""
    scorer = Scorer(task, Engine(bundle, runtime=task.runtime, threads=threads))
    for part in parts:
        yield from scorer.score(part)


class Scorer:
    """Scores parts with an engine of its own."""

    def __init__(self, task: Task, engine: Engine) -> None:
        self.task, self.engine = task, engine
        self.catalogue = engine.bundle.catalogue
        self.steps = engine.bundle.default_steps if task.steps is None else task.steps
        self.histories = open_histories(task.histories, task.part_users)

    def score(self, part: Part, suffix: str = ".partial") -> Iterator[int]:
        """Scores and writes one part; gives the number of rows done after every batch."""
        rows = self.histories.read(part)
        rejects = [row for row in rows if isinstance(row, Reject)]
        yield len(rejects)
        answered: dict[int, dict[str, Any]] = {}
        for batch in self.batches([row for row in rows if isinstance(row, User)]):
            for user, answer in zip(batch, self.answer(batch), strict=True):
                if isinstance(answer, Reject):
                    rejects.append(answer)
                else:
                    answered[user.row] = answer
            yield len(batch)
        if rejects:  # before the part, whose appearance says that all is there
            with atomic_write(self.task.part_rejects(part.number), suffix) as path:
                lines = [json.dumps(asdict(reject)) for reject in sorted(rejects, key=lambda reject: reject.row)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table = pa.Table.from_pylist([answered[row] for row in sorted(answered)], SCHEMA)
        with atomic_write(self.task.part_file(part.number), suffix) as path:
            pq.write_table(table, path)

    def batches(self, users: list[User]) -> Iterator[list[User]]:
        """Users with histories of like length together: no time is spent on padding."""
        longest = self.engine.bundle.max_items
        ordered = sorted(users, key=lambda user: min(len(user.history), longest))
        for first in range(0, len(ordered), self.task.batch):
            yield ordered[first : first + self.task.batch]

    def answer(self, batch: Sequence[User]) -> list[dict[str, Any] | Reject]:
        """An answer per user. Where a batch fails its users are tried alone, and those who fail again are set aside."""
        try:
            return list(self.search(batch))
        except Exception as error:
            if len(batch) == 1:
                return [Reject(batch[0].row, batch[0].user_id, f"{type(error).__name__}: {error}")]
            alone = [self.answer([user])[0] for user in batch]
            if all(isinstance(answer, Reject) for answer in alone):
                raise  # then it is not a row's fault
            return alone

    def search(self, batch: Sequence[User]) -> list[dict[str, Any]]:
        """As in the service, only known items count; without any the answer is the most popular items."""
        task = self.task
        queries = [Query(history=user.history, k=task.k, exclude_seen=task.exclude_seen) for user in batch]
        found = recommend_batch(self.engine, queries, Plan(self.steps, task.beam))
        return [
            {
                "user_id": user.user_id,
                "items": [self.catalogue.item_ids[index] for index in recommendation.items],
                "scores": recommendation.scores,
                "source": recommendation.source,
            }
            for user, recommendation in zip(batch, found, strict=True)
        ]


class Progress:
    """A line about how far it is and how long it will take: in place on a terminal, else every `every` seconds."""

    def __init__(self, total: int, done: int, every: float = 10.0) -> None:
        self.total, self.done, self.fresh = total, done, 0
        self.terminal = sys.stderr.isatty()
        self.every = 0.5 if self.terminal else every
        self.started = self.shown = time.monotonic()
        if done:
            print(f"{done:,} of {total:,} users are scored already", file=sys.stderr)

    def add(self, rows: int) -> None:
        self.done, self.fresh = self.done + rows, self.fresh + rows
        now = time.monotonic()
        if now - self.shown < self.every and self.done < self.total:
            return
        self.shown = now
        rate = max(self.fresh, 1) / max(now - self.started, 1e-9)
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        line = f"scored {self.done:,} of {self.total:,} ({self.done / self.total:.1%}), {rate:,.0f} users/s, "
        line += f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        end = "\r" if self.terminal and self.done < self.total else "\n"
        print(line.ljust(78), end=end, file=sys.stderr, flush=True)


def _check(task: Task, bundle: Bundle) -> None:
    if not 1 <= task.k <= task.beam:
        raise ScoreError(f"--k must lie in 1..{task.beam}, the width of the beam; widen --beam or ask for fewer items.")
    if task.steps is not None and not 0 <= task.steps <= bundle.max_steps:
        raise ScoreError(f"--steps must lie in 0..{bundle.max_steps}, the range of this bundle.")
    if min(task.batch, task.part_users) < 1:
        raise ScoreError("--batch and --part-users must be at least 1.")


def _same_run(task: Task, bundle: Bundle) -> None:
    """Parts of a run with other histories, bundle or options must not be mixed with ours."""
    with task.histories.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    steps = bundle.default_steps if task.steps is None else task.steps
    wanted = {"histories": digest, "bundle": bundle.version, "k": task.k, "beam": task.beam, "steps": steps,
              "exclude_seen": task.exclude_seen, "part_users": task.part_users, "runtime": task.runtime}  # fmt: skip
    note = task.parts_folder / "run.json"
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != wanted:
            raise ScoreError(
                f"{task.parts_folder} belongs to a run with other histories, bundle or options; "
                "choose another --out or remove that folder."
            )
    else:
        for stale in task.parts_folder.glob("part-*"):
            stale.unlink()
        with atomic_write(note) as path:
            path.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def _is_done(task: Task, part: Part) -> bool:
    """A part that cannot be opened, say after a fault of the disk, is made again."""
    try:
        answered = pq.read_metadata(task.part_file(part.number)).num_rows
    except (OSError, pa.ArrowException):
        return False
    return bool(answered + len(_rejects(task, part)) == part.rows)


def _rejects(task: Task, part: Part) -> list[str]:
    path = task.part_rejects(part.number)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _assemble(task: Task, parts: Sequence[Part]) -> Summary:
    """OUT and its rejects from all parts, in the order of the histories, a part at a time."""
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
