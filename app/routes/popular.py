"""What is popular and what is trending, for everybody alike."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from app.answers import to_items
from app.checks import revalidated_router
from app.deps import RulesDep, ServiceDep
from app.errors import declared
from app.lifecycle import Service
from app.schemas.popular import PopularResponse
from serving.online import query as online
from serving.online import trends
from serving.online.counters import Window

router = revalidated_router(
    tags=["items"],
    responses=declared(404, 422),
)

K = Annotated[int, Query(ge=1, le=100)]


@router.get("/popular", response_model=PopularResponse)
async def popular(service: ServiceDep, rules: RulesDep, k: K = 10, window: Window = "week") -> PopularResponse:
    """Items with the most events lately, on histories and in feedback; an event counts less the older it is. Behind
    them, as far as k is not reached, what is popular in the bundle."""
    return await _answer(service, rules, k, window, is_rise=False)


@router.get("/trending", response_model=PopularResponse)
async def trending(
    service: ServiceDep, rules: RulesDep, k: K = 10, window: Literal["hour", "day", "week"] = "day"
) -> PopularResponse:
    """Items with more events than their own past predicts, those furthest above it first. Fewer than k, if fewer
    rise."""
    return await _answer(service, rules, k, window, is_rise=True)


async def _answer(service: Service, rules: online.Query, k: int, window: Window, is_rise: bool) -> PopularResponse:
    service.check_ready()
    recommender, counters = service.recommender, service.counters
    bundle = recommender.bundle
    resolved = online.resolve(bundle, rules, ())
    if is_rise:
        rising = await trends.trending(counters, bundle.catalogue, window)
        found = trends.permitted(bundle.catalogue, rising, resolved.rules, k)
    else:
        taken = await trends.popular(counters, bundle.catalogue, window)
        found = await trends.filled(recommender.popular, taken, resolved.rules, k)
    return PopularResponse(
        model_version=bundle.version,
        window=window,
        items=to_items(bundle.catalogue, found.rows, found.scores),
        events=(await counters.read(window)).total,
        shared=counters.is_shared,
        unknown_items=resolved.unknown_items,
    )
