"""The live catalogue: how large it is, which changes it has and what they did to items, and its named subsets."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import Path, Query

from app.answers import to_time
from app.checks import admin_router, keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.lifecycle import Service
from app.schemas.catalogues import (
    CataloguesResponse,
    ChangedItem,
    ChangedItems,
    NamedCatalogue,
    Subset,
)
from serving.items.changed import KINDS, ChangeKind, ItemChange
from serving.online.live_catalogue import LiveCatalogue
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
    body: Subset,
    service: ServiceDep,
) -> NamedCatalogue:
    """A named subset of the items, which requests may choose: a list, or whatever passes a filter, now and as items and
    times change. One of the same name is replaced."""
    service.check_ready()
    await service.name_catalogue(name, body.model_dump())
    return await _named(service, name)


# For operators alone: it names what they have taken away, and what is not available yet.
@changes.get("/changes", response_model=ChangedItems)
async def list_changed_items(
    service: ServiceDep,
    change: Annotated[list[ChangeKind] | None, Query(description="only such changes; given several times")] = None,
    after: Annotated[int | None, Query(ge=1, description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ChangedItems:
    """The items that changes have added, changed or removed so far, whoever made them, in every process the same. An
    item that changes again while you turn pages moves ahead of them; no page repeats another."""
    items, position = service.items, service.changes.position
    found = await asyncio.to_thread(items.changed.newest, limit + 1, change or KINDS, after)  # one more: is it the end?
    page = found[:limit]
    return ChangedItems(
        position=position,
        items=[_changed(items, each) for each in page],
        next=page[-1].number if len(found) > limit else None,
    )


@router.get("", response_model=CataloguesResponse)
async def list_catalogues(service: ServiceDep) -> CataloguesResponse:
    service.check_ready()
    bundle, changes = service.bundle, service.changes
    position = changes.position  # before the items are counted, which may take a while: they have at least its changes
    named = [await _named(service, name) for name in bundle.catalogue.subset_names]
    return CataloguesResponse(
        version=bundle.version,
        position=position,
        items=bundle.catalogue.listed_count,
        lag_seconds=round(changes.lag, 3),
        durable=changes.log.is_durable,
        catalogues=named,
    )


def _changed(items: LiveCatalogue, change: ItemChange) -> ChangedItem:
    begin, end = items.window(change.row)
    return ChangedItem(
        item_id=items.catalogue.item_ids[change.row],
        title=items.catalogue.titles[change.row],
        change=change.kind,
        changed_at=to_time(change.at),
        available_from=to_time(begin),
        available_until=to_time(end),
    )


async def _named(service: Service, name: str) -> NamedCatalogue:
    recommender = service.recommender
    catalogue = recommender.bundle.catalogue
    rules = catalogue.resolve(Rules(catalogue=name), time.time())
    items = await recommender.scans.run(lambda: int(catalogue.members(rules).sum()))
    return NamedCatalogue(name=name, items=items, filter=catalogue.filters.get(name))
