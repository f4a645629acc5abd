"""A bundle's own sample: what the model answered to a few histories when it was exported, asked again before it serves.

A model that answers otherwise than it was measured to (other kernels, a faulty device, a runtime that its weights do
not bear) is not the one whose accuracy the bundle states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.types import Answer, EncoderState, Request, SampleAnswer

SIZE = 32  # histories
K, BEAM_WIDTH = 10, 50
# [open] The int8 gate asks for 95% on a thousand users; so few histories need room for chance.
LEAST_OVERLAP = 0.9  # mean share of the recorded items that are found again


class Searches(Protocol):
    """An engine, as far as a sample needs it."""

    bundle: Bundle

    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]: ...

    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]: ...


def record_sample(engine: Searches, histories: Sequence[Sequence[int]]) -> list[SampleAnswer]:
    """Answers to the first SIZE histories (catalogue rows), without steps and with the most."""
    ids, most = engine.bundle.catalogue.item_ids, engine.bundle.max_items
    chosen = [history[-most:] for history in histories[:SIZE]]
    return [
        SampleAnswer([ids[row] for row in history], steps, [ids[row] for row in found])
        for steps in sorted({0, engine.bundle.max_steps})
        for history, found in zip(chosen, _answers(engine, chosen, steps), strict=True)
    ]


def check_sample(engine: Searches) -> float | None:
    """The share of the recorded items that the engine finds again; None for a bundle without a sample.

    Raises BundleError if that is too small."""
    bundle = engine.bundle
    if not bundle.sample:
        return None
    shares = []
    for steps in sorted({each.steps for each in bundle.sample}):
        recorded = [each for each in bundle.sample if each.steps == steps]
        answers = _answers(engine, [_rows(bundle, each.history) for each in recorded], steps)
        for each, found in zip(recorded, answers, strict=True):
            expected = set(_rows(bundle, each.items))
            shares.append(len(expected.intersection(found)) / max(1, len(expected)))
    overlap = sum(shares) / len(shares)
    if overlap < LEAST_OVERLAP:
        raise BundleError(
            f"The bundle {bundle.name} does worse than when it was exported: of the items in its sample it finds "
            f"{overlap:.0%} again, and {LEAST_OVERLAP:.0%} are required; choose another runtime, or export it again."
        )
    return overlap


def _answers(engine: Searches, histories: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """Catalogue rows, best first."""
    if not histories:
        return []
    requests = [Request(tuple(history), K, BEAM_WIDTH, steps) for history in histories]
    return [answer.items for answer in engine.search(requests, engine.encode(histories))]


def _rows(bundle: Bundle, item_ids: Sequence[str]) -> list[int]:
    rows = bundle.catalogue.rows(item_ids)
    if None in rows:
        raise BundleError(
            f"The sample of the bundle {bundle.name} has an item that its catalogue does not have; export it again."
        )
    return [row for row in rows if row is not None]
