"""Items as they are, as they are put, and what is similar to them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    model_validator,
)

from app.schemas.common import Body, Id, Problem, one_of
from serving.items.fields import to_seconds
from serving.types import AlikeBy

Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Words = Annotated[str, Field(max_length=1000)]
FieldValue = Annotated[
    Words | float | bool | Annotated[list[Words], Field(max_length=100)],
    one_of("Give a number, true, false, a string of at most 1000 characters, or a list of at most 100 such strings"),
]


def _as_iso(value: object) -> object:
    """pydantic would also guess what a number stands for: by its size, for seconds or for milliseconds."""
    if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value, re.ASCII)):
        raise ValueError("give an ISO 8601 time with its offset, such as 2026-11-29T08:30:00Z")
    return value


def _can_be_written(time: datetime) -> datetime:
    if to_seconds(time) is None:
        raise ValueError("must lie in the years 1 to 9999 in UTC; leave it out for no bound")
    return time


def _has_a_page(item_id: str) -> str:
    if item_id.endswith("/similar"):
        raise ValueError("must not end in /similar, where the items like another one are read; choose another id")
    return item_id


NewId = Annotated[Id, AfterValidator(_has_a_page)]
Time = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_as_iso), AfterValidator(_can_be_written)]


class Item(BaseModel):
    item_id: str
    title: str | None
    categories: list[str]
    brand: str | None = None
    fields: dict[str, str | float | bool | list[str]] = {}  # a bundle's have no bounds
    available_from: datetime | None = None
    available_until: datetime | None = None
    popularity: float
    tokens: list[int] = Field(description="the semantic ID as vocabulary ids")


class ItemsResponse(BaseModel):
    items: list[Item]


class SimilarItem(BaseModel):
    item_id: str
    title: str | None
    categories: list[str]
    by: AlikeBy
    score: float = Field(
        description="together: this item's share of what follows or resembles the other; content: cosine similarity"
    )


class SimilarResponse(BaseModel):
    item_id: str
    model_version: str
    items: list[SimilarItem] = Field(description="best first; if there are both kinds, those taken together come first")
    unknown_items: list[str] = Field(description="ids in allow or deny that are not in the catalogue")


class ItemFields(Body):
    """All that is known about an item. A new item gets its semantic ID from its text: title, brand, categories and
    description."""

    title: Words | None = None
    brand: Words | None = None
    categories: Annotated[list[Id], Field(max_length=100)] = []
    description: Annotated[str, Field(max_length=10_000)] | None = None
    fields: Annotated[dict[Name, FieldValue], Field(max_length=50)] = Field(
        {},
        description="other attributes, for filters: numbers, strings, booleans, lists; ISO 8601 strings are times",
    )
    available_from: Time | None = Field(None, description="not recommended before this time")
    available_until: Time | None = Field(None, description="not recommended from this time on")

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.available_from and self.available_until and self.available_from >= self.available_until:
            raise ValueError("available_until must be later than available_from")
        return self

    @model_validator(mode="after")
    def _fields_hide_nothing(self) -> Self:
        if "categories" in self.fields or ("brand" in self.fields and self.brand is not None):
            raise ValueError("brand and categories have a place of their own beside fields; put them there alone")
        return self

    def to_entry(self, item_id: str) -> dict[str, Any]:
        """As the log of changes has it: times in seconds since 1970."""
        begin, end = self.available_from, self.available_until
        times = {
            "available_from": None if begin is None else to_seconds(begin),
            "available_until": None if end is None else to_seconds(end),
        }
        return self.model_dump(exclude={"item_id"}) | {"item_id": item_id} | times


class PutItem(ItemFields):
    item_id: NewId


class ItemsRequest(Body):
    items: Annotated[list[PutItem], Field(min_length=1, max_length=1000)]


class ItemsPut(BaseModel):
    results: list[Item | Problem] = Field(description="one for each item of the request, in the same order")
