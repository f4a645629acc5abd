"""What bodies of several routes are made of: ids, text, filters, events, problems."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from serving.items.filter_parser import MAX_LENGTH
from serving.types import MAX_ID_LENGTH, MAX_TIMESTAMP, MAX_TYPE_LENGTH, Event

MAX_ITEMS = 10_000
MAX_RECEIPT_LENGTH = 32_768  # of the id of a recommendation with 10,000 items

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)]
Items = Annotated[list[Id], Field(max_length=MAX_ITEMS)]
RecommendationId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_RECEIPT_LENGTH)]
FilterText = Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]


def one_of(wanted: str) -> WrapValidator:
    """For a union: what is none of its kinds is one error, which says what is wanted. pydantic would give one for each
    kind, at a place that it names after the kind."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("one_of", "{wanted}", {"wanted": wanted}) from error

    return WrapValidator(validate)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)  # "10" is not a number


class HistoryEvent(Body):
    """What somebody did with an item; an item id alone stands for an event about which nothing else is known."""

    item_id: Id
    type: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TYPE_LENGTH)] | None = Field(
        None, description="such as view or purchase; a model may weight types, and leave some out"
    )
    value: float | None = Field(None, description="such as a price or a rating; kept with the event")
    timestamp: float | None = Field(None, ge=0, le=MAX_TIMESTAMP, description="seconds since 1970")

    def to_event(self) -> Event:
        return Event(self.item_id, self.type, self.value, self.timestamp)


# Ids come first: a history without events pays nothing for there being some.
HistoryItem = Annotated[Id | HistoryEvent, Field(union_mode="left_to_right")]


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    position: int | None = Field(
        None, description="position of the character at which a filter is wrong, the first being 1"
    )
    errors: list[dict[str, str]] | None = Field(None, description="all invalid fields, if there are several")
    retry_after: int | None = Field(None, description="seconds")
