"""What users did with recommendations, event by event and summed up."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.schemas.common import Body, Id, RecommendationId
from serving.online.feedback import FeedbackEvent
from serving.types import MAX_TIMESTAMP


class FeedbackRequest(Body):
    """What somebody did with an item of a recommendation."""

    recommendation_id: RecommendationId
    item_id: Id
    event: FeedbackEvent
    value: float | None = Field(None, description="such as a price or seconds played; kept as it is")
    time: float | None = Field(
        None, ge=0, le=MAX_TIMESTAMP, description="seconds since the epoch; default: when the request arrived"
    )


class FeedbackResponse(BaseModel):
    counted: bool = Field(description="false: this event on this item of this recommendation was counted before")
    position: int = Field(description="position of the item in the list, 1 for the best; the next page counts on")
    kept: bool = Field(description="whether it is kept for training; false: it is only counted")


class Rate(BaseModel):
    """A share with its 95% confidence interval (Wilson)."""

    share: float
    low: float
    high: float


class FeedbackSummary(BaseModel):
    """Feedback on one model, source and number of steps, since this service started."""

    version: str
    source: str
    reasoning_steps: int
    recommendations: int
    events: dict[str, int]
    hit_rate: Rate | None = Field(
        description="share of recommendations with any event but impressions; null without any"
    )
    click_through_rate: Rate | None = Field(description="clicks per impression; null without impressions")


class FeedbackSummaries(BaseModel):
    summaries: list[FeedbackSummary]
