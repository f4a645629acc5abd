"""Offline scoring on many processes or machines: the same parts, scored by the actors of a Ray Data pipeline.

Every machine must see bundle, histories and output under the same paths and have this package installed. Without
RAY_ADDRESS a cluster is started on this machine for as long as the command runs.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import ScoreError, ServingError
from serving.offline.input import Part
from serving.offline.scorer import Scorer, Task


class PartScorer:
    """An actor: loads the bundle once, then scores part after part."""

    def __init__(self, task: Task) -> None:
        self.scorer = Scorer(task, Engine(Bundle.load(task.bundle), runtime=task.runtime))

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Returns the number of rows done, or the problem: Ray would wrap an exception's one sentence in a traceback.

        Unfinished files have a unique suffix: an actor may outlive a killed run and must not write into the next one's.
        """
        try:
            rows = sum(self.scorer.score(Part(**part), suffix=f".{uuid.uuid4().hex}.partial"))
        except ServingError as error:
            return {"rows": 0, "problem": str(error)}
        return {"rows": rows, "problem": ""}


def run_on_ray(task: Task, parts: Sequence[Part], workers: int) -> Iterator[int]:
    """Scores parts with `workers` actors of one core each. Raises ScoreError with the problem that an actor reports."""
    if not parts:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False  # `Progress` has one
    rows = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=min(len(parts), 1000))
    scorer: Any = PartScorer  # Ray's type hints allow functions only
    actors = ray.data.ActorPoolStrategy(size=min(workers, len(parts)))
    done = rows.map(scorer, fn_constructor_args=(task,), compute=actors, num_cpus=1)
    for row in done.iter_rows():
        if row["problem"]:
            raise ScoreError(row["problem"])
        yield int(row["rows"])
