"""Between what clients read and write and what the recommender takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from app.schemas.answers import (
    Explanation,
    ItemExplanation,
    NamedItem,
    ReasoningStep,
    RecommendedItem,
    RecommendResponse,
    Timings,
)
from app.schemas.common import HistoryEvent
from app.schemas.recommend import RankRequest, RecommendRequest
from serving.bundle import Bundle
from serving.items.catalogue import Catalogue
from serving.items.events import are_ids
from serving.items.fields import to_datetime
from serving.online import query as online
from serving.online import receipts
from serving.online.listing import Recommendation
from serving.online.models import Assigned, Models
from serving.online.query import Query
from serving.steps import Steps
from serving.types import Event, Trace, searches_of


async def recommend(models: Models, assigned: Assigned, secret: bytes) -> RecommendResponse:
    """The answer to one request of a client. secret: seals its id. Raises serving's errors."""
    return to_response(assigned.recommender.bundle, assigned.query, await models.recommend(assigned), secret)


def work_of(assigned: Assigned) -> int:
    """The most work a request may make: beam rows times (reasoning steps + 1)."""
    query = assigned.query
    most = assigned.recommender.bundle.most_steps(query.steps)
    return assigned.recommender.beam_width(query) * searches_of(query.explore) * (most + 1)


def to_history(items: Sequence[str | HistoryEvent]) -> Sequence[str | Event]:
    if are_ids(items):
        return items
    return [item if isinstance(item, str) else item.to_event() for item in items]


def to_query(body: RecommendRequest | RankRequest, steps: Steps, client: str, secret: bytes) -> Query:
    """secret: has sealed the id of the page before. Raises RequestError."""
    what: dict[str, Any]
    if isinstance(body, RankRequest):
        what = {"k": len(body.items), "allow": body.items, "exclude_seen": False, "rank_only": True}
    else:
        rules = ("exclude_seen", "allow", "deny", "categories", "catalogue")
        names = ("k", "beam_width", "diversity", "max_per_category", "explore", "rotation", *rules)
        what = {name: getattr(body, name) for name in names}
        if body.after is not None:
            before = receipts.read(body.after, secret, "after")
            what["shown"] = (*before.earlier, *before.items)
    return Query(
        history=to_history(body.history) if body.history else (),
        user_id=body.user_id,
        steps=steps,
        paths=body.reasoning_paths,
        dense_weight=body.dense_weight,
        neighbours_weight=body.neighbours_weight,
        filter=body.filter,
        boosts=[(boost.filter, boost.factor) for boost in body.boost] if body.boost else (),
        timeout=None if body.timeout_ms is None else body.timeout_ms / 1000,
        explain=body.explain,
        client=client,
        **what,
    )


def to_response(bundle: Bundle, query: Query, found: Recommendation, secret: bytes) -> RecommendResponse:
    by_model = found.source == "model"
    items = to_items(bundle.catalogue, found.items, found.scores)
    unknown = found.unknown_items
    if query.rank_only:  # what cannot be recommended now has no score either
        ranked = {item.item_id for item in items}
        unknown = list(dict.fromkeys([*unknown, *(item_id for item_id in query.allow or () if item_id not in ranked)]))
    return RecommendResponse(
        recommendation_id=receipts.issue(
            bundle.version,
            found.source,
            found.plan.steps,
            query.user_id,
            [item.item_id for item in items],
            secret,
            query.shown,
        ),
        user_id=query.user_id,
        model_version=bundle.version,
        source=found.source,
        reasoning_steps=found.plan.steps,
        reasoning_paths=(query.paths or bundle.settings.paths) if by_model else 0,
        beam_width=0 if query.rank_only else found.plan.beam_width,
        cache=found.cache,
        items=items,
        unknown_items=unknown,
        timings_ms=Timings(**{stage: round(1000 * seconds, 3) for stage, seconds in found.seconds.items()}),
        explanation=to_explanation(bundle, query, found, found.trace) if found.trace else None,
    )


def to_time(seconds: float | None) -> datetime | None:
    """seconds: since 1970."""
    return None if seconds is None else to_datetime(seconds)


def to_items(catalogue: Catalogue, rows: Sequence[int], scores: Sequence[float]) -> list[RecommendedItem]:
    ids, titles, categories = catalogue.item_ids, catalogue.titles, catalogue.categories
    return [
        RecommendedItem(ids[row], score, titles[row], categories[row]) for row, score in zip(rows, scores, strict=True)
    ]


def to_explanation(bundle: Bundle, query: Query, found: Recommendation, trace: Trace) -> Explanation:
    """Per step the items nearest to the model's state; per item the parts of its score."""
    catalogue = bundle.catalogue

    def step(number: int, nearest: list[int]) -> ReasoningStep:
        items = [NamedItem(item_id=catalogue.item_ids[row], title=catalogue.titles[row]) for row in nearest]
        has_token = 0 < number <= len(trace.reasoning_tokens)
        return ReasoningStep(
            step=number,
            token=trace.reasoning_tokens[number - 1] if has_token else None,
            log_probability=trace.reasoning_log_probs[number - 1] if has_token else None,
            nearest_items=items,
        )

    neighbour_scores: Sequence[float | None] = trace.neighbour_scores or [None] * len(found.items)
    neighbours_weight, gate = query.neighbours_weight, bundle.settings.gate
    boosts = online.boosts_of(catalogue, query)
    boosted = catalogue.log_factors(boosts, found.items).tolist() if boosts else [None] * len(found.items)
    items = zip(
        found.items, trace.token_log_probs, trace.dense_scores, neighbour_scores, trace.similarity, boosted, strict=True
    )
    return Explanation(
        steps=[step(number, nearest) for number, nearest in enumerate(trace.nearest_items)],
        items=[
            ItemExplanation(
                item_id=catalogue.item_ids[row],
                token_log_probabilities=tokens,
                dense_score=dense,
                neighbour_score=neighbour_score,
                similarity=similarity,
                boost=boost,
            )
            for row, tokens, dense, neighbour_score, similarity, boost in items
        ],
        dense_weight=bundle.dense_weight if query.dense_weight is None else query.dense_weight,
        neighbours_weight=bundle.neighbours_weight if neighbours_weight is None else neighbours_weight,
        gate=trace.gate,
        **({} if gate is None else {"network_power": gate.network_power, "memory_power": gate.memory_power}),
    )
