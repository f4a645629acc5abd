"""Items of the catalogue: one by its id, or a search over titles; for operators, put and taken away."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Query, Response

from app import errors
from app.answers import to_time
from app.checks import admin_router, revalidated_router
from app.deps import ItemId, RulesDep, ServiceDep
from app.errors import NotFound, declared
from app.lifecycle import Service
from app.schemas.common import Problem
from app.schemas.items import (
    Item,
    ItemFields,
    ItemsPut,
    ItemsRequest,
    ItemsResponse,
    NewId,
    PutItem,
    SimilarItem,
    SimilarResponse,
)
from serving.errors import RequestError
from serving.items.catalogue import Catalogue
from serving.online import query as online
from serving.online.live_catalogue import LiveCatalogue
from serving.online.similar import Similar
from serving.types import AlikeBy

router = revalidated_router(
    prefix="/items",
    tags=["items"],
    responses=declared(422),
)
changes = admin_router(
    prefix="/items",
    tags=["items"],
    responses=declared(413, 415, 422),
)


@router.get("", response_model=ItemsResponse, response_model_exclude_unset=True)
async def find_items(
    service: ServiceDep,
    query: Annotated[str, Query(max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ItemsResponse:
    """Items whose title contains every word of the query, most popular first; without a query, all items."""
    items = service.items  # once: another model may become active meanwhile
    rows = await asyncio.to_thread(items.catalogue.find_titles, query, limit)
    return ItemsResponse(items=[_item(items, row) for row in rows])


# Ahead of the route for an item: one whose id ends in "/similar" is not found by it, so that none such can be put.
@router.get("/{item_id:anything}/similar", response_model=SimilarResponse, responses=declared(404))
async def similar_items(
    item_id: ItemId,
    service: ServiceDep,
    rules: RulesDep,
    k: Annotated[int, Query(ge=1, le=100)] = 10,
    by: Annotated[
        AlikeBy | None, Query(description="default: those taken together with it, then those like it")
    ] = None,
) -> SimilarResponse:
    """Items for the page of another one: what users took together with it, and what is like it by its content, which
    needs no user to have seen either."""
    service.check_ready()
    recommender, row = service.recommender, _row(service, item_id)
    resolved = online.resolve(recommender.bundle, rules, ())
    found = await recommender.similar.find(row, resolved.rules, k, by)
    return SimilarResponse(
        item_id=item_id,
        model_version=recommender.bundle.version,
        items=[_similar(recommender.bundle.catalogue, each) for each in found],
        unknown_items=resolved.unknown_items,
    )


@router.get("/{item_id:anything}", response_model=Item, response_model_exclude_unset=True, responses=declared(404))
async def read_item(item_id: ItemId, service: ServiceDep) -> Item:
    service.check_ready()
    return _item(service.items, _row(service, item_id))


@changes.put("/{item_id:anything}", response_model=Item, response_model_exclude_unset=True, responses=declared(409))
async def put_item(item_id: NewId, body: ItemFields, service: ServiceDep) -> Item:
    """Add an item, or change one: what is left out is emptied. A new item gets a semantic ID from its text, which it
    keeps. Acknowledged once stored, and it can be recommended from then on; after a 503, look whether it is there."""
    service.check_ready()
    [result] = await service.put_items([body.to_entry(item_id)])
    if isinstance(result, Exception):
        raise result
    return _item(*result)


@changes.post("", response_model=ItemsPut, response_model_exclude_unset=True)
async def put_items(body: ItemsRequest, service: ServiceDep) -> ItemsPut:
    """Add or change many items, with one result for each, in their order."""
    service.check_ready()
    first: dict[str, PutItem] = {}
    for item in body.items:
        first.setdefault(item.item_id, item)
    put = dict(
        zip(first, await service.put_items([item.to_entry(item.item_id) for item in first.values()]), strict=True)
    )
    doubled = RequestError("This id is named twice; only the first item of it was put.", "item_id")

    def result(item: PutItem) -> Item | Problem:
        found = put[item.item_id] if item is first[item.item_id] else doubled
        return errors.problem(found) if isinstance(found, Exception) else _item(*found)

    return ItemsPut(results=[result(item) for item in body.items])


@changes.delete("/{item_id:anything}", status_code=204, responses=declared(404))
async def delete_item(item_id: ItemId, service: ServiceDep) -> Response:
    """Take an item out of every answer. Histories may go on to name it, and it can be put again."""
    service.check_ready()
    _row(service, item_id)
    await service.delete_items([item_id])
    return Response(status_code=204)


def _row(service: Service, item_id: str) -> int:
    row = service.bundle.catalogue.row(item_id)
    if row is None or service.items.changed.is_removed(row):
        raise NotFound("The catalogue has no item with this id.")
    return row


def _similar(catalogue: Catalogue, similar: Similar) -> SimilarItem:
    return SimilarItem(
        item_id=catalogue.item_ids[similar.item],
        title=catalogue.titles[similar.item],
        categories=catalogue.categories[similar.item],
        by=similar.by,
        score=similar.score,
    )


def _item(items: LiveCatalogue, row: int) -> Item:
    """What was put with the item alone has fields and times, and only those that were named."""
    catalogue, (begin, end) = items.catalogue, items.window(row)
    more: dict[str, Any] = {}
    fields = catalogue.fields_of(row)
    if isinstance(fields.get("brand"), str):
        more["brand"] = fields.pop("brand")
    if fields:
        more["fields"] = fields
    if begin is not None:
        more["available_from"] = to_time(begin)
    if end is not None:
        more["available_until"] = to_time(end)
    return Item(
        item_id=catalogue.item_ids[row],
        title=catalogue.titles[row],
        categories=catalogue.categories[row],
        popularity=float(catalogue.popularity[row]),
        tokens=catalogue.tokens[row].tolist(),
        **more,
    )
