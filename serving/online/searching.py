"""What runs on the engine's thread: searches of one plan, their encoder states first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serving.bundle import Bundle
from serving.items.live import LiveIndex
from serving.online.cache import Flight
from serving.online.costs import CostTable
from serving.online.observer import Observer
from serving.types import Answer, EncoderState, Request


class EngineLike(Protocol):
    """What a request needs of an engine; `serving.engine.Engine` is the one there is."""

    bundle: Bundle

    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]: ...

    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]: ...

    def warm_up(self) -> None: ...

    @property
    def room(self) -> float: ...

    def refresh(self, rows: Sequence[int]) -> list[int]: ...

    def with_room(self) -> LiveIndex: ...

    def adopt(self, index: LiveIndex) -> list[int]: ...


@dataclass(slots=True)
class Search:
    """One request for the engine's thread: the engine that answers it, which stays as long as somebody waits, and the
    encoder state it shares with others of its user and history."""

    engine: EngineLike
    request: Request
    flight: Flight = field(default_factory=Flight)


def run_batch(searches: Sequence[Search], costs: CostTable, observer: Observer) -> list[Answer]:
    """Answers to searches of one plan. What they cost is recorded."""
    answers, seconds = encode_and_search(searches)
    first, rows = searches[0], sum(search.request.beam_rows for search in searches)
    if first.request.paths is None and first.request.items is None:  # the table is of searches, by the bundle's paths
        costs.observe(first.request.reasoning_steps, rows, seconds, first.engine.bundle.version)
    observer.batch_ran(len(searches), rows, answers[0].seconds)
    return answers


def encode_and_search(searches: Sequence[Search]) -> tuple[list[Answer], float]:
    """Answers to searches of one engine and one plan, and the seconds they took together. States are left in the
    flights."""
    started, engine = time.perf_counter(), searches[0].engine
    missing = {id(search.flight): search for search in searches if search.flight.state is None}.values()
    encoded = engine.encode([search.request.history for search in missing]) if missing else []
    for search, state in zip(missing, encoded, strict=True):
        search.flight.state = state
    encode = time.perf_counter() - started if missing else 0.0
    states = [search.flight.state for search in searches if search.flight.state is not None]
    answers = engine.search([search.request for search in searches], states)
    for answer in answers:
        answer.seconds = {"encode": encode} | answer.seconds
    return answers, time.perf_counter() - started
