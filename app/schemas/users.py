"""Events of a user, and what is kept about them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from app.schemas.common import Body, HistoryEvent, HistoryItem


class EventsRequest(Body):
    items: Annotated[list[HistoryItem], Field(min_length=1, max_length=1000)] = Field(
        description="item ids and events, oldest first, as given"
    )


class EventsResponse(BaseModel):
    user_id: str
    stored: int
    history_length: int
    unknown_items: list[str] = Field(description="stored, but not in the current catalogue")


class UserResponse(BaseModel):
    user_id: str
    items: list[str | HistoryEvent] = Field(description="the known history, oldest first, as it was sent")
    cached: list[str] = Field(description="the cache tiers that hold an encoded history")
    shown: list[str] = Field(description="items shown recently but not taken, oldest first; kept for `rotation`")
    feedback: int = Field(
        description="how many records of feedback on the user's recommendations are kept for training"
    )
