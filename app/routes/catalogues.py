"""The live catalogue: how large it is, which changes it has, and its named subsets."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Path

from app.checks import admin_router, keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.lifecycle import Service
from app.schemas import CatalogueFilter, CatalogueItems, CataloguesResponse, NamedCatalogue
from serving.types import MAX_ID_LENGTH, Rules

router = keyed_router(
    prefix="/catalogues",
    tags=["items"],
    responses=declared(),
)


changes = admin_router(
    prefix="/catalogues",
    tags=["items"],
    responses=declared(413, 415, 422),
)


@changes.put("/{name:anything}", response_model=NamedCatalogue)
async def name_catalogue(
    name: Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH)],
    body: CatalogueItems | CatalogueFilter,
    service: ServiceDep,
) -> NamedCatalogue:
    """A named subset of the items, which requests may choose: a list, or whatever passes a filter, now and as items and
    times change. One of the same name is replaced."""
    service.check_ready()
    await service.name_catalogue(name, body.model_dump())
    return _named(service, name)


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
        catalogues=[_named(service, name) for name in bundle.catalogue.subset_names],
    )


def _named(service: Service, name: str) -> NamedCatalogue:
    catalogue = service.bundle.catalogue
    rules = catalogue.resolve(Rules(catalogue=name), time.time())
    return NamedCatalogue(name=name, items=len(catalogue.members(rules)), filter=catalogue.filters.get(name))
