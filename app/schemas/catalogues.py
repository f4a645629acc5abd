"""The live catalogue, its named subsets and its changed items."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from app.schemas.common import Body, FilterText, Items
from serving.items.changed import Kind


class ChangedItem(BaseModel):
    """An item that is not as the model's bundle has it, by its last change."""

    item_id: str
    title: str | None
    change: Kind = Field(description="added: the bundle has no such item; changed: it has; removed: in no answer")
    changed_at: datetime | None = Field(description="null where the log of changes has no time")
    available_from: datetime | None
    available_until: datetime | None


class ChangedItems(BaseModel):
    position: str = Field(description="of the last change that is in the list, as GET /catalogues has it")
    items: list[ChangedItem] = Field(description="the one that changed last first, each once")
    next: int | None = Field(description="what `after` takes to go on behind these; null at the end")


class CatalogueItems(Body):
    """A named subset as a list."""

    items: Items = Field(description="those that the catalogue does not have are ignored")


class CatalogueFilter(Body):
    """A named subset as whatever passes a filter, now and as items and times change."""

    filter: FilterText


def _of_its_kind(value: Any, handler: ValidatorFunctionWrapHandler) -> CatalogueItems | CatalogueFilter:
    """The subset by what its body has, so that errors are those of the kind meant."""
    if not isinstance(value, dict) or not value.keys() & {"items", "filter"}:
        raise PydanticCustomError("one_of", "Give items, a list of ids, or a filter")
    return (CatalogueFilter if "filter" in value else CatalogueItems).model_validate(value)


Subset = Annotated[CatalogueItems | CatalogueFilter, WrapValidator(_of_its_kind)]


class NamedCatalogue(BaseModel):
    name: str
    items: int = Field(description="listed items in it")
    filter: str | None = Field(None, exclude_if=lambda text: text is None, description="absent if it is a list")


class CataloguesResponse(BaseModel):
    """The live catalogue of the active model, as this process has it."""

    version: str = Field(description="of the model")
    position: str = Field(description="of the last change applied: equal where all have applied the same")
    items: int = Field(description="items that may be recommended")
    lag_seconds: float = Field(description="since this process last knew that it has applied every change")
    durable: bool = Field(description="whether changes outlive a restart")
    catalogues: list[NamedCatalogue]
