"""The served model: its version, accuracy and measured cost."""

from __future__ import annotations

from app.checks import keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.schemas import Cost, Model, ModelsResponse

router = keyed_router(
    prefix="/models",
    tags=["models"],
    responses=declared(),
)


@router.get("", response_model=ModelsResponse)
async def list_models(service: ServiceDep) -> ModelsResponse:
    service.check_ready()
    bundle = service.bundle
    return ModelsResponse(
        models=[
            Model(
                version=bundle.version,
                name=bundle.name,
                active=True,
                items=len(bundle.catalogue),
                max_steps=bundle.max_steps,
                default_steps=bundle.default_steps,
                max_history_items=bundle.max_items,
                max_beam_width=service.settings.max_beam_width,
                dense_weight=bundle.dense_weight,
                neighbours_weight=bundle.neighbours_weight,
                categories=sorted(bundle.catalogue.category_names),
                catalogues=sorted(bundle.catalogue.subsets),
                accuracy=bundle.accuracy,
                cost=[Cost(**row) for row in service.costs.table()],
            )
        ]
    )
