"""The live catalogue: how large it is, which changes it has, and its named subsets."""

from __future__ import annotations

from app.checks import keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.schemas import CataloguesResponse, NamedCatalogue
from serving.types import Rules

router = keyed_router(
    prefix="/catalogues",
    tags=["items"],
    responses=declared(),
)


@router.get("", response_model=CataloguesResponse)
async def list_catalogues(service: ServiceDep) -> CataloguesResponse:
    service.check_ready()
    bundle, changes = service.bundle, service.changes
    return CataloguesResponse(
        version=bundle.version,
        position=changes.position,
        items=int(bundle.catalogue.listed.sum()),
        lag_seconds=round(changes.lag, 3),
        durable=changes.log.is_durable,
        catalogues=[
            NamedCatalogue(name=name, items=len(bundle.catalogue.members(Rules(catalogue=name))))
            for name in sorted(bundle.catalogue.subsets)
        ],
    )
