"""Accuracy measured with the search that serves: while training, and of a bundle on a data folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from serving.bundle import Bundle
from serving.network.eager import EagerRuntime
from serving.search.ranker import Ranker
from serving.types import BundleSettings, EventData
from training.data.errors import DataError
from training.data.prepare import sample_events, sample_users, split_by, weigh, without_learnt
from training.data.read import Dataset
from training.metrics import ndcg, paired_gain, recall_ndcg, target_ranks
from training.stages.diagnostics import reasoning_diagnostics
from training.workspace import Workspace

UPDATE = "update"  # the name in tables of a bundle that is being made of an earlier one


class Ranks(Protocol):
    """What `measure` needs of a ranker: `serving.search.ranker.Ranker`, or one that ranks each user by its own."""

    @property
    def settings(self) -> BundleSettings: ...

    def rank(
        self,
        histories: Sequence[np.ndarray],
        steps: int,
        beam: int,
        *,
        exclude_seen: bool = False,
        events: Sequence[EventData] | None = None,
    ) -> np.ndarray: ...


def measure(
    ranker: Ranks,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    steps: int,
    beam: int,
    *,
    exclude_seen: bool = False,
    events: Sequence[EventData] | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """A row of a table (`steps`, `users`, recall and NDCG at 5 and 10, `beam`, `seconds`), and ranked items (U, 10)."""
    started = time.perf_counter()
    ranked = ranker.rank(histories, steps, beam, exclude_seen=exclude_seen, events=events)
    settings = ranker.settings
    row = {
        "steps": steps,
        "users": len(target),
        **{name: round(value, 5) for name, value in recall_ndcg(ranked, target).items()},
        "beam": beam,
        "paths": settings.paths,
        "dense_weight": settings.dense_weight,
        "neighbours_weight": settings.neighbours_weight,
        "dense_candidates": settings.dense_candidates,
        "excluded": exclude_seen,
    }
    return row | {"seconds": round(time.perf_counter() - started, 2)}, ranked


@torch.no_grad()
def validate(work: Workspace, reasons: bool = True) -> dict[str, Any]:
    """Validation while training: NDCG@10 per l, of the dense score alone without reasoning (`state`), and the figures
    of `reasoning_diagnostics`.

    "score", what a stage keeps its best weights by, is the mean over the measured l, for one checkpoint has to serve
    them all; while a stage does not train answers after reasoning yet (`reasons` False), it is that of l = 0.
    """
    evaluation = work.config.evaluation
    histories, target = sample_users(work.split.valid_history, work.split.valid_target, evaluation.valid_users)
    events = sample_events(work.split.valid_events, evaluation.valid_users)
    ranker = work.ranker()
    result: dict[str, Any] = {}
    for steps in sorted({0, *evaluation.steps}):
        row, _ = measure(
            ranker, histories, target, steps, evaluation.beam, exclude_seen=evaluation.exclude_seen, events=events
        )
        result[f"ndcg@10/l{steps}"] = row["ndcg@10"]
    by_state = ranker.rank_by_state(histories, 0, exclude_seen=evaluation.exclude_seen, events=events)
    result["ndcg@10/state"] = round(float(ndcg(target_ranks(by_state, target)).mean()), 5)
    judged = evaluation.steps if reasons else (0,)
    result["score"] = float(np.mean([result[f"ndcg@10/l{steps}"] for steps in judged]))
    deepest = max(evaluation.steps)
    return result | reasoning_diagnostics(work, histories[:500], target[:500], deepest, events and events[:500])


def bundle_ranker(bundle: Bundle) -> Ranker:
    """Full ranking with a bundle as it is, in eager torch."""
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(bundle.network, tokens, bundle.settings.attention, bundle.item_index)
    return Ranker.of(runtime, bundle.vocabulary, bundle.settings, bundle.neighbours)


def compare(work: Workspace, earlier: Bundle) -> list[dict[str, Any]]:
    """An update and the bundle that it goes on from, in one catalogue and on the same test events: a row per number of
    steps and model, that of the update with its gain in NDCG@10 and the ends of a 95% interval. `users` are those that
    were drawn of all `of`."""
    evaluation = work.config.evaluation
    histories, target = sample_users(work.split.test_history, work.split.test_target, evaluation.choice_users)
    events = sample_events(work.split.test_events, evaluation.choice_users)
    rankers = {earlier.version: bundle_ranker(earlier), UPDATE: work.ranker()}
    rows: list[dict[str, Any]] = []
    for steps in sorted({0, *evaluation.steps}):
        gains = []
        for model, ranker in rankers.items():
            row, ranked = measure(
                ranker, histories, target, steps, evaluation.beam, exclude_seen=evaluation.exclude_seen, events=events
            )
            gains.append(ndcg(target_ranks(ranked, target)))
            rows.append({"model": model, **row, "of": len(work.split.test_target), "split": "test"})
        rows[-1] |= paired_gain(gains[1], gains[0])
    return rows


def evaluate_bundle(
    bundle: Bundle,
    data: Dataset,
    steps: Sequence[int],
    split: str,
    beam: int,
    users: int,
    exclude_seen: bool,
    paths: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per number of steps for a bundle on a data folder, split as for training. DataError where items differ, and
    where the bundle has learnt from what is held out.

    users 0: all of them; a row says of how many its `users` were drawn (`of`). paths None: the bundle's.
    """
    rows = [bundle.catalogue.row(item_id) for item_id in data.items.item_ids]
    if None in rows:
        missing = data.items.item_ids[rows.index(None)]
        raise DataError(
            f"{data.name} has the item {missing!r}, which the bundle does not know; "
            "evaluate on the data it was trained on."
        )
    to_row = np.asarray(rows, dtype=np.int64)
    data = weigh(data, dict(bundle.settings.type_weights))
    kind = bundle.about.get("config", {}).get("split", "leave-one-out")
    held_out = without_learnt(
        data, split_by(data, kind, times=bundle.settings.time_bias), bundle.about.get("learnt_until")
    )
    histories = held_out.test_history if split == "test" else held_out.valid_history
    target = held_out.test_target if split == "test" else held_out.valid_target
    every = len(target)
    if not every:
        other = "measure it with --split test" if split == "valid" else "measure it on newer events"
        raise DataError(f"The bundle {bundle.name} has learnt from the events that {data.name} holds out; {other}.")
    events = sample_events(held_out.test_events if split == "test" else held_out.valid_events, users or every)
    histories, target = sample_users(histories, target, users or every)
    histories, target = [to_row[history] for history in histories], to_row[target]
    ranker = bundle_ranker(bundle)
    if paths is not None:
        ranker = replace(ranker, settings=replace(bundle.settings, paths=paths))
    for number in steps:
        row, _ = measure(ranker, histories, target, number, beam, exclude_seen=exclude_seen, events=events)
        yield row | {"of": every, "split": split}
