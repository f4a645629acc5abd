"""Answers to requests of `recommend`, one by one and in batches, with their explanations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from app.schemas.common import Problem
from serving.types import AnsweredBy, StateFrom

# Parts of every answer. The service itself makes them, so they need no validation: dataclasses are cheaper than models.


@dataclass(slots=True)
class RecommendedItem:
    """One item of an answer."""

    item_id: str
    score: float
    title: str | None = None
    categories: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Timings:
    """Milliseconds. `encode`, `reason` and `decode` are those of the batch that the request was in. `reason` is not 0
    with 0 steps: the first pass of the decoder, which every answer needs, counts as reasoning."""

    queue: float = 0.0
    cache: float = 0.0
    encode: float = 0.0
    reason: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class NamedItem(BaseModel):
    item_id: str
    title: str | None = None


class ReasoningStep(BaseModel):
    """The model's state before any reasoning (step 0) or after a reasoning step."""

    step: int
    token: int | None = Field(None, description="vocabulary id; null at step 0, or if steps have no tokens")
    log_probability: float | None = None
    nearest_items: list[NamedItem]


class ItemExplanation(BaseModel):
    item_id: str
    token_log_probabilities: list[float] = Field(description="one per token of the semantic ID")
    dense_score: float
    neighbour_score: float | None = Field(
        None,
        description="log of the item's share in the item graph, or its log score; null if it has none",
    )
    boost: float | None = Field(
        None, exclude_if=lambda boost: boost is None, description="log of the factors, added to the score"
    )
    similarity: list[float] = Field(description="cosine similarity of the state and the item, one per step")


class Explanation(BaseModel):
    """The items nearest to the model's state after each step, and the parts of each item's score."""

    steps: list[ReasoningStep]
    items: list[ItemExplanation]
    dense_weight: float
    neighbours_weight: float
    gate: float | None = Field(
        None,
        exclude_if=lambda gate: gate is None,
        description="the network's probability g in score = log(g * exp(log-probabilities + dense_weight * dense_score)"
        " ** alpha + (1 - g) * exp(neighbour_score) ** beta) / alpha; absent if the model adds neighbours_weight *"
        " neighbour_score instead",
    )
    network_power: float = Field(1.0, exclude_if=lambda power: power == 1, description="alpha; absent if it is 1")
    memory_power: float = Field(1.0, exclude_if=lambda power: power == 1, description="beta; absent if it is 1")


@dataclass(slots=True)
class RecommendResponse:
    """The answer to one request."""

    recommendation_id: str
    user_id: str | None
    model_version: str
    source: AnsweredBy
    reasoning_steps: int
    reasoning_paths: int
    beam_width: Annotated[int, Field(description="0 if given items were ranked, since nothing was searched for")]
    cache: StateFrom
    items: Annotated[list[RecommendedItem], Field(description="best first, distinct")]
    unknown_items: Annotated[
        list[str],
        Field(
            description="ids in history, allow or deny that are not in the catalogue; removed items in allow or deny "
            "(a history still uses them); items that could not be ranked"
        ),
    ]
    timings_ms: Timings
    explanation: Explanation | None = None


ANSWER = TypeAdapter(RecommendResponse)


class BatchResponse(BaseModel):
    results: list[RecommendResponse | Problem] = Field(description="in the order of the requests")
