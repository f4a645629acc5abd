"""Presets of requests for recommendations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.schemas.recommend import Listing


class Scenario(Listing):
    """A preset of requests that name it. What a request says itself wins."""

    reasoning_steps: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(
        None, description="default: the model's default"
    )


class NamedScenario(Scenario):
    name: str


class ScenariosResponse(BaseModel):
    scenarios: list[NamedScenario]
