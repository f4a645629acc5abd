"""Requests for recommendations and for the ranks of given items.

Bounds that depend on settings or the bundle are checked by the recommender.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.common import MAX_ITEMS, Body, FilterText, HistoryItem, Id, Items, RecommendationId
from serving.types import MAX_BOOSTS

MAX_PATHS = 16
MAX_RANKED = 1000
EXAMPLE: dict[str, JsonValue] = {"history": [], "k": 5}  # works as it is, whatever the catalogue


class Boost(Body):
    """Adds log(factor) to the model's score of every item that passes the filter."""

    filter: FilterText
    factor: float = Field(ge=0.001, le=1000, description="above 1 for more of these items, below 1 for fewer")


class Answering(Body):
    """How the model answers."""

    reasoning_paths: int | None = Field(
        None, ge=1, le=MAX_PATHS, description="reasoning paths searched in parallel; default: the bundle's"
    )
    dense_weight: float | None = Field(
        None, ge=0, le=1000, description="weight of the dense score; default: the bundle's"
    )
    neighbours_weight: float | None = Field(
        None, ge=0, le=1000, description="weight of the item graph, 0: the network alone; default: the bundle's"
    )
    filter: FilterText | None = Field(
        None, description='only items that pass, such as price < 50 and brand in ["A", "B"]; docs/FILTERS.md has all'
    )
    boost: Annotated[list[Boost], Field(max_length=MAX_BOOSTS)] | None = Field(
        None, description="what to recommend more or less of"
    )
    timeout_ms: float | None = Field(None, gt=0, le=600_000, description="time budget")


class UserRequest(Answering):
    """The user, their history, and how the model answers."""

    user_id: Id | None = Field(None, description="without it nothing is cached and no known history is used")
    history: Annotated[list[HistoryItem], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="item ids and events, oldest first, as given; omitted or empty: the known history"
    )
    explain: bool = False


class Listing(Answering):
    """What may be recommended, how much of it, and how it is listed."""

    k: int = Field(10, ge=1, description="how many items to return")
    beam_width: int | None = Field(
        None, ge=1, description="at least k; default: the larger of k and the service's default"
    )
    exclude_seen: bool = Field(True, description="never recommend items of the history")
    allow: Items | None = Field(None, description="recommend only these")
    deny: Items = Field(default_factory=list, description="never recommend these")
    categories: Annotated[list[Id], Field(max_length=100)] = Field(
        default_factory=list, description="recommend only items in at least one of these; empty: no restriction"
    )
    catalogue: Id | None = Field(None, description="recommend only items of this named subset")
    diversity: float = Field(
        0, ge=0, le=1, description="how much the list avoids similar items; it is chosen from all that the beams find"
    )
    max_per_category: int | None = Field(
        None, ge=1, description="most items per category; the list is shorter if the beams find no others"
    )
    rotation: float = Field(
        0,
        ge=0,
        le=1,
        description="how far to move down items that the user was shown recently but did not take (from POST "
        "/feedback): 0.5 as if half as probable, 1 behind all others",
    )
    explore: int = Field(
        0,
        ge=0,
        description="slots reserved for new items, which nobody had when the model was trained, the model's best "
        "first; if there are fewer, other items fill the list",
    )

    @model_validator(mode="after")
    def _k_fits_the_beam(self) -> Self:
        if self.beam_width is not None and self.k > self.beam_width:
            raise PydanticCustomError("exceeds", "k must not exceed beam_width", {"field": "k"})
        if self.explore > self.k:
            raise PydanticCustomError("exceeds", "explore must not exceed k", {"field": "explore"})
        return self


class RecommendRequest(Listing, UserRequest):
    """The user, their history, and what may be recommended to them."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    scenario: Id | None = Field(None, description="name of a preset for all that this request leaves out")
    after: RecommendationId | None = Field(
        None,
        description="recommendation_id of the previous page, which this answer continues. Send everything else as for "
        "that page; all pages together have at most as many items as the widest permitted beam",
    )


class RankRequest(UserRequest):
    """The user, their history, and the items to put in order for them."""

    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_RANKED)] = Field(
        description="item ids; each is scored, including seen ones, and returned once"
    )


class BatchRequest(Body):
    """Each request is validated on its own, so that an invalid one does not affect the others."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [EXAMPLE]}]})

    requests: Annotated[
        list[Any],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/RecommendRequest"}}),
    ]
