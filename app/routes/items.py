"""Items of the catalogue: one by its id, or a search over titles."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Query

from app.checks import keyed_router
from app.deps import ItemId, ServiceDep
from app.errors import NotFound, declared
from app.schemas import Item, ItemsResponse
from serving.items.catalogue import Catalogue

router = keyed_router(
    prefix="/items",
    tags=["items"],
    responses=declared(422),
)


@router.get("", response_model=ItemsResponse)
async def find_items(
    service: ServiceDep,
    query: Annotated[str, Query(max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ItemsResponse:
    """Items whose title contains every word of the query, most popular first; without a query, all items."""
    service.check_ready()
    rows = await asyncio.to_thread(service.bundle.catalogue.find_titles, query, limit)
    return ItemsResponse(items=[_item(service.bundle.catalogue, row) for row in rows])


@router.get("/{item_id:anything}", response_model=Item, responses=declared(404))
async def read_item(item_id: ItemId, service: ServiceDep) -> Item:
    service.check_ready()
    row = service.bundle.catalogue.row(item_id)
    if row is None:
        raise NotFound("The catalogue has no item with this id.")
    return _item(service.bundle.catalogue, row)


def _item(catalogue: Catalogue, row: int) -> Item:
    return Item(
        item_id=catalogue.item_ids[row],
        title=catalogue.titles[row],
        categories=catalogue.categories[row],
        popularity=float(catalogue.popularity[row]),
        tokens=catalogue.tokens[row].tolist(),
    )
