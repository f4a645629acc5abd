"""What is popular or trending."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.schemas.answers import RecommendedItem
from serving.online.counters import Window


class PopularResponse(BaseModel):
    model_version: str
    window: Window
    items: list[RecommendedItem] = Field(
        description="best first; score: events in the window, or how far they are above what was to be expected, in "
        "standard deviations; 0: by the bundle's popularity"
    )
    events: float = Field(description="in the window, on all items; an event counts less the older it is")
    shared: bool = Field(description="false: counted by the process that answered, and no other")
    unknown_items: list[str] = Field(description="ids in allow or deny that are not in the catalogue")
