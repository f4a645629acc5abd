"""Scenarios: presets of rules, k, steps and more, which requests choose by name."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Response

from app.answers import to_query
from app.checks import admin_router, keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.lifecycle import Service
from app.scenarios import KIND
from app.schemas.recommend import RecommendRequest
from app.schemas.scenarios import NamedScenario, Scenario, ScenariosResponse
from serving.items.filter_parser import parse_filter
from serving.online.query import boosts_of
from serving.types import MAX_ID_LENGTH

router = keyed_router(
    prefix="/scenarios",
    tags=["recommend"],
    responses=declared(),
)
changes = admin_router(
    prefix="/scenarios",
    tags=["recommend"],
    responses=declared(413, 415, 422),
)

ScenarioName = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH)]


@router.get("", response_model=ScenariosResponse, response_model_exclude_unset=True)
async def list_scenarios(service: ServiceDep) -> ScenariosResponse:
    service.check_ready()
    return ScenariosResponse(scenarios=[_named(service, name) for name in sorted(service.scenarios.by_name)])


@changes.put("/{name:anything}", response_model=NamedScenario, response_model_exclude_unset=True)
async def put_scenario(name: ScenarioName, body: Scenario, service: ServiceDep) -> NamedScenario:
    """Preset what requests leave out that name this scenario. One of the same name is replaced."""
    service.check_ready()
    request = RecommendRequest.model_validate(body.model_dump(exclude_unset=True, exclude={"reasoning_steps"}))
    query = to_query(request, body.reasoning_steps, "", service.settings.user_secret)
    # The operator learns of a mistake, and not whoever requests.
    if body.filter is not None:
        parse_filter(body.filter)
    boosts_of(service.bundle.catalogue, query)
    service.recommender.check(query)
    await _change(service, name, body.model_dump(exclude_unset=True))
    return _named(service, name)


@changes.delete("/{name:anything}", status_code=204, responses=declared(404))
async def delete_scenario(name: ScenarioName, service: ServiceDep) -> Response:
    """From now on requests that name this scenario are refused."""
    service.check_ready()
    service.scenarios.get(name)
    await _change(service, name, None)
    return Response(status_code=204)


async def _change(service: Service, name: str, preset: dict[str, Any] | None) -> None:
    """Raises StoreUnavailable and RequestError."""
    [result] = await service.changes.make(KIND, [{"name": name, "preset": preset}])
    if isinstance(result, Exception):
        raise result


def _named(service: Service, name: str) -> NamedScenario:
    return NamedScenario(name=name, **service.scenarios.get(name).model_dump(exclude_unset=True))
