"""From what a search found, or what is popular, to the list that a query asks for."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from serving.bundle import Bundle
from serving.online import receipts
from serving.online.admission import Plan
from serving.online.diversity import choose
from serving.online.impressions import lowered
from serving.online.query import Query, Resolved
from serving.online.trends import Ranked
from serving.types import Answer, AnsweredBy, Rules, StateFrom, Trace


@dataclass(slots=True)
class Recommendation:
    """Catalogue rows, best first, and how they came about. `seconds`: per stage, `total` included."""

    items: list[int]
    scores: list[float]
    source: AnsweredBy
    plan: Plan
    unknown_items: list[str]
    cache: StateFrom = "off"
    seconds: dict[str, float] = field(default_factory=dict)
    trace: Trace | None = None


def without_invalid(bundle: Bundle, answer: Answer, rules: Rules) -> Answer:
    """The answer without items that must not be in it. There are none; this is the last look before a client's."""
    keep = bundle.catalogue.permitted_indices(answer.items, rules)
    if len(keep) == len(answer.items):
        return answer
    return answer.select(keep)


def to_list(
    bundle: Bundle, query: Query, answer: Answer, rotated: Collection[str] = (), *, are_logs: bool = True
) -> Answer:
    """The list that a query asks for, of what was found for it. rotated: the items that go down. are_logs: what scores
    are."""
    scores = answer.scores
    if rotated:
        scores = lowered(_ids(bundle, answer), scores, rotated, query.rotation, are_logs=are_logs)
    if query.diversity or query.max_per_category is not None or query.explore or query.rotation:
        chosen = choose(
            bundle, answer.items, scores, query.length, query.diversity, query.max_per_category, query.explore
        )
        answer = answer.select(chosen)
    if query.shown:
        answer = answer.select(receipts.unshown(_ids(bundle, answer), query.shown)[: query.k])
    return answer


def _ids(bundle: Bundle, answer: Answer) -> list[str]:
    return [bundle.catalogue.item_ids[row] for row in answer.items]


def popular(
    bundle: Bundle,
    query: Query,
    resolved: Resolved,
    beam_width: int,
    started: float,
    ranked: Ranked,
    rotated: Collection[str] = (),
) -> Recommendation:
    """For those of whom nothing is known. ranked: as many popular items as the query has to find, which its rules
    permit. rotated: items that go down."""
    answer = to_list(bundle, query, Answer(*ranked), rotated, are_logs=False)
    plan, seconds = Plan(0, beam_width), {"total": time.monotonic() - started}
    return Recommendation(answer.items, answer.scores, "popularity", plan, resolved.unknown_items, seconds=seconds)
