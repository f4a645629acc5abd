"""What it takes to bring up an engine: opening a bundle's folder, the searches that measure what a batch costs, and
which folders an operator may name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from app.settings import Settings
from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import RequestError
from serving.online.admission import narrower_beams
from serving.online.searching import EngineLike, Search
from serving.types import Request, Rules

CALIBRATION_RUNS = 2


def open_engine(settings: Settings, folder: Path) -> Engine:
    """Raises BundleError, and EngineError where this machine cannot run it."""
    return Engine(
        Bundle.load(folder), runtime=settings.runtime, threads=settings.threads, state_dtype=settings.state_dtype
    )


def calibration(settings: Settings, engine: EngineLike) -> Iterator[list[Search]]:
    """Batches to run, so that the first time budget meets measurements instead of guesses: every number of steps with
    one search, but batches of every size only with no steps, the default number and the most, because they take most of
    a start. Until the others are measured, `CostTable` takes them for the next larger. On a GPU every shape is run:
    that captures its graph before a request needs it."""
    bundle = engine.bundle
    history = tuple(bundle.catalogue.popular(bundle.max_items, Rules()))
    beam, k = settings.default_beam_width, min(10, settings.default_beam_width)
    alone = [(width, 1) for width in narrower_beams(beam, k)]
    largest_batch = max(1, min(settings.max_batch, settings.max_batch_rows // beam))
    batches = [(beam, 2**power) for power in range(1, largest_batch.bit_length())]
    every = range(bundle.max_steps + 1)
    in_batches = every if settings.runtime == "cuda" else sorted({0, bundle.default_steps, bundle.max_steps})
    shapes = [*product(every, alone), *product(in_batches, batches)]
    for steps, (width, count) in shapes:
        request = Request(history, k, width, steps, Rules(exclude=history))
        for _ in range(CALIBRATION_RUNS):
            yield [Search(engine, request) for _ in range(count)]


def folder_of(settings: Settings, path: str) -> Path:
    """The folder that an operator names, below the one that the settings permit. Raises RequestError."""
    if settings.models_dir is None:
        raise RequestError("Set STREAMREC_MODELS_DIR to the folder that holds the bundles to load.", "path")
    root = settings.models_dir.resolve()
    try:
        folder = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a ring of links
        folder = root
    if folder == root or not folder.is_relative_to(root):  # also where a link leads out
        raise RequestError("Name a folder inside STREAMREC_MODELS_DIR, relative to it.", "path")
    return folder
