"""The models: those that are loaded, one more, the one that answers, one less; and who is answered by which."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from app.checks import admin_router, keyed_router
from app.deps import ServiceDep
from app.errors import UnfitBundle, declared
from app.lifecycle import Service
from app.schemas.models import (
    MAX_VERSION_LENGTH,
    Cost,
    Model,
    ModelRequest,
    ModelsResponse,
    StepsFigures,
    TrafficBody,
    TrafficResponse,
)
from serving.bundle import Bundle
from serving.errors import BundleError, RequestError
from serving.online.recommender import Recommender

Version = Annotated[str, Path(min_length=1, max_length=MAX_VERSION_LENGTH)]

router = keyed_router(tags=["models"], responses=declared())
changes = admin_router(tags=["models"], responses=declared(409, 413, 415, 422))


@router.get("/models", response_model=ModelsResponse)
async def list_models(service: ServiceDep) -> ModelsResponse:
    """The models that are loaded: version, what each number of reasoning steps gains and costs, as measured."""
    service.check_ready()
    return ModelsResponse(models=[_model(service, each) for each in service.models.loaded.values()])


@changes.post("/models", response_model=Model, status_code=201)
async def add_model(body: ModelRequest, service: ServiceDep) -> Model:
    """Load a bundle beside the others: its hashes are checked, its answers compared with those of its export, its cost
    is measured. It answers nobody before it is activated or given traffic. Takes seconds to minutes."""
    service.check_ready()
    try:
        return _model(service, await service.add_model(body.path))
    except BundleError as error:
        raise UnfitBundle(str(error), "path") from error


@changes.post("/models/{version:anything}/activate", response_model=Model, responses=declared(404))
async def activate_model(version: Version, service: ServiceDep) -> Model:
    """Answer by this model from now on, here at once and in other processes within seconds. Requests that have begun
    keep theirs. The model before stays loaded: activate it to roll back."""
    service.check_ready()
    await service.change_models(service.models.activation(version))
    return _model(service, service.models.active)


@changes.delete("/models/{version:anything}", status_code=204, responses=declared(404))
async def retire_model(version: Version, service: ServiceDep) -> Response:
    """Unload a model that is neither active nor given traffic. Its memory is free once its last request is answered."""
    service.check_ready()
    await service.change_models(service.models.retirement(version))
    return Response(status_code=204)


@router.get("/traffic", response_model=TrafficResponse)
async def read_traffic(service: ServiceDep) -> TrafficResponse:
    """Which model answers whom."""
    service.check_ready()
    return _traffic(service)


@changes.put("/traffic", response_model=TrafficResponse, responses=declared(404))
async def direct_traffic(body: TrafficBody, service: ServiceDep) -> TrafficResponse:
    """Split the users over models and numbers of reasoning steps, in place of the split before. A user stays in an arm
    as long as `name` stays. Users whom no arm takes are answered by the active model. `shadow` searches for requests
    as well, and nobody gets its answers; metrics say how far they agree."""
    service.check_ready()
    change = service.models.direction(body.to_traffic())
    for index, arm in enumerate(body.arms):
        loaded = service.models.loaded.get(arm.version)
        if loaded is not None and (arm.reasoning_steps or 0) > loaded.bundle.max_steps:
            raise RequestError(
                f"This model takes 0 to {loaded.bundle.max_steps} reasoning steps.", f"arms.{index}.reasoning_steps"
            )
    await service.change_models(change)
    return _traffic(service)


def _model(service: Service, model: Recommender) -> Model:
    bundle = model.bundle
    cost = [Cost(**row) for row in service.costs.table(bundle.version)]
    return Model(
        version=bundle.version,
        name=bundle.name,
        active=model is service.models.active,
        items=bundle.catalogue.listed_count,
        max_steps=bundle.max_steps,
        default_steps=bundle.default_steps,
        max_history_items=bundle.max_items,
        max_beam_width=service.settings.max_beam_width,
        dense_weight=bundle.dense_weight,
        neighbours_weight=bundle.neighbours_weight,
        categories=sorted(bundle.catalogue.category_names),
        catalogues=bundle.catalogue.subset_names,
        accuracy=bundle.accuracy,
        cost=cost,
        by_steps=_by_steps(bundle, cost, service.settings.default_beam_width),
    )


def _by_steps(bundle: Bundle, cost: list[Cost], beam_width: int) -> list[StepsFigures]:
    accuracy = {row.get("steps"): row for row in bundle.accuracy}
    median_ms = {row.reasoning_steps: row.median_ms for row in cost if row.beam_rows == beam_width}

    def figures(steps: int) -> StepsFigures:
        row = accuracy.get(steps, {})
        return StepsFigures(
            reasoning_steps=steps,
            auto=steps in bundle.worthwhile_steps,
            users=row.get("users"),
            of=row.get("of"),
            recall_at_10=row.get("recall@10"),
            ndcg_at_10=row.get("ndcg@10"),
            gain=row.get("gain"),
            gain_low=row.get("gain_low"),
            gain_high=row.get("gain_high"),
            detectable=row.get("detectable"),
            median_ms=median_ms.get(steps),
        )

    return [figures(steps) for steps in range(bundle.max_steps + 1)]


def _traffic(service: Service) -> TrafficResponse:
    deployment = service.models.deployment
    return TrafficResponse(active=deployment.active, **TrafficBody.of(deployment.traffic).model_dump())
