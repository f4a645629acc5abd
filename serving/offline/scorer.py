"""Scores the histories of one part: what to score and how, and an answer or a reject per row.

Answers are those of the service (`serving/online/recommender.py`), without its cache and queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.engine import Engine
from serving.files import atomic_write
from serving.offline.input import Part, Reject, User, open_histories
from serving.online.admission import Plan
from serving.online.listing import Recommendation
from serving.online.query import Query
from serving.online.recommender import recommend_batch
from serving.types import RuntimeName

SCHEMA = pa.schema([
    ("user_id", pa.string()),
    ("items", pa.list_(pa.string())),
    ("scores", pa.list_(pa.float32())),
    ("source", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)  # without slots: the command line reads the defaults
class Task:
    """What to score, and how. steps: None for the bundle's default. part_users: the most that a kill can cost."""

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


class Scorer:
    """Scores parts of a task with an engine of its own."""

    def __init__(self, task: Task, engine: Engine) -> None:
        self.task, self.engine = task, engine
        bundle = engine.bundle
        self.item_ids, self.max_items = bundle.catalogue.item_ids, bundle.max_items
        self.plan = Plan(bundle.default_steps if task.steps is None else task.steps, task.beam)
        self.histories = open_histories(task.histories, task.part_users)

    def score(self, part: Part, suffix: str = ".partial") -> Iterator[int]:
        """Scores and writes one part; yields the number of rows done after every batch.

        suffix: of the unfinished files, see `atomic_write`.
        """
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
        rejects_file = self.task.part_rejects(part.number)  # in place before the part: one that exists is complete
        if not rejects:
            rejects_file.unlink(missing_ok=True)  # of an earlier try, in which the engine failed on a row
        else:
            with atomic_write(rejects_file, suffix) as path:
                lines = [json.dumps(asdict(reject)) for reject in sorted(rejects, key=lambda reject: reject.row)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table = pa.Table.from_pylist([answered[row] for row in sorted(answered)], SCHEMA)
        with atomic_write(self.task.part_file(part.number), suffix) as path:
            pq.write_table(table, path)

    def batches(self, users: list[User]) -> Iterator[list[User]]:
        """Users whose histories have similar lengths, to save padding."""
        ordered = sorted(users, key=lambda user: min(len(user.history), self.max_items))
        for first in range(0, len(ordered), self.task.batch):
            yield ordered[first : first + self.task.batch]

    def answer(self, batch: Sequence[User]) -> list[dict[str, Any] | Reject]:
        """A row or a reject per user. If a batch fails, its users are tried one by one."""
        task = self.task
        queries = [Query(user.history, k=task.k, exclude_seen=task.exclude_seen) for user in batch]
        try:
            found = recommend_batch(self.engine, queries, self.plan)
        except Exception as error:
            if len(batch) == 1:
                return [Reject(batch[0].row, batch[0].user_id, f"{type(error).__name__}: {error}")]
            one_by_one = [self.answer([user])[0] for user in batch]
            if all(isinstance(answer, Reject) for answer in one_by_one):
                raise  # the fault is the engine's, not a row's
            return one_by_one
        return [self._row(user, recommendation) for user, recommendation in zip(batch, found, strict=True)]

    def _row(self, user: User, found: Recommendation) -> dict[str, Any]:
        items = [self.item_ids[row] for row in found.items]
        return {"user_id": user.user_id, "items": items, "scores": found.scores, "source": found.source}
