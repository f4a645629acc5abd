"""Presets of requests for recommendations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.schemas.common import one_of
from app.schemas.recommend import Listing


class Scenario(Listing):
    """A preset for requests that name it. What a request sets itself takes precedence."""

    reasoning_steps: (
        Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], one_of("Give a number of steps, 0 or more, or auto")]
        | None
    ) = Field(None, description="default: the model's default")


class NamedScenario(Scenario):
    name: str


class ScenariosResponse(BaseModel):
    scenarios: list[NamedScenario]
