"""What is popular or trending."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.schemas.answers import RecommendedItem
from serving.online.counters import Window


class PopularResponse(BaseModel):
    model_version: str
    window: Window
    items: list[RecommendedItem] = Field(
        description="best first; score: events in the window or, of trending items, by how many standard deviations "
        "they exceed what their past predicts; 0: by the bundle's popularity"
    )
    events: float = Field(description="events in the window, on all items; older events count less")
    shared: bool = Field(
        description="whether all processes count together; false: the one that answered counts its own"
    )
    unknown_items: list[str] = Field(description="ids in allow or deny that are not in the catalogue")
