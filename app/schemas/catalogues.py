"""The live catalogue, its named subsets and its changed items."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from app.schemas.common import Body, FilterText, Items
from serving.items.changed import ChangeKind


class ChangedItem(BaseModel):
    """An item that differs from what the model's bundle has, with its last change."""

    item_id: str
    title: str | None
    change: ChangeKind = Field(
        description="added: not in the bundle; changed: in the bundle; removed: in no answer any more"
    )
    changed_at: datetime | None = Field(description="null if the log of changes has no time for it")
    available_from: datetime | None
    available_until: datetime | None


class ChangedItems(BaseModel):
    position: str = Field(description="position of the last change in the list, as in GET /catalogues")
    items: list[ChangedItem] = Field(description="the most recently changed first, each once")
    next: int | None = Field(description="the `after` of the next page; null at the end")


class CatalogueItems(Body):
    """A named subset as a list."""

    items: Items = Field(description="ids that the catalogue does not have are ignored")


class CatalogueFilter(Body):
    """A named subset of whatever passes a filter, now and as items and times change."""

    filter: FilterText


def _of_its_kind(value: Any, handler: ValidatorFunctionWrapHandler) -> CatalogueItems | CatalogueFilter:
    """The subset by what its body has, so that errors are those of the kind meant."""
    if not isinstance(value, dict) or not value.keys() & {"items", "filter"}:
        raise PydanticCustomError("one_of", "Give items, a list of ids, or a filter")
    return (CatalogueFilter if "filter" in value else CatalogueItems).model_validate(value)


Subset = Annotated[CatalogueItems | CatalogueFilter, WrapValidator(_of_its_kind)]


class NamedCatalogue(BaseModel):
    name: str
    items: int = Field(description="number of its items that may be recommended")
    filter: str | None = Field(None, exclude_if=lambda text: text is None, description="absent if it is a list")


class CataloguesResponse(BaseModel):
    """The live catalogue of the active model, as this process has it."""

    version: str = Field(description="version of the model")
    position: str = Field(
        description="position of the last change applied; equal in processes that have applied the same changes"
    )
    items: int = Field(description="number of items that may be recommended")
    lag_seconds: float = Field(description="seconds since this process last knew that it had applied every change")
    durable: bool = Field(description="whether changes outlive a restart")
    catalogues: list[NamedCatalogue]
