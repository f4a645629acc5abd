"""From the engine's rows to what a client reads: items with names, what scores are made of."""

from __future__ import annotations

from collections.abc import Sequence

from app.schemas import Explanation, ItemExplanation, NamedItem, ReasoningStep, RecommendedItem
from serving.bundle import Bundle
from serving.items.catalogue import Catalogue
from serving.types import Answer, Request, Trace


def named(catalogue: Catalogue, rows: Sequence[int], scores: Sequence[float]) -> list[RecommendedItem]:
    ids, titles, categories = catalogue.item_ids, catalogue.titles, catalogue.categories
    return [
        RecommendedItem(ids[row], score, titles[row], categories[row]) for row, score in zip(rows, scores, strict=True)
    ]


def explained(bundle: Bundle, request: Request, answer: Answer) -> Explanation:
    """Step by step what the state came near to, and of every item what its score is made of."""
    trace, catalogue = answer.trace, bundle.catalogue
    assert isinstance(trace, Trace)

    def step(number: int, nearest: list[int]) -> ReasoningStep:
        items = [NamedItem(item_id=catalogue.item_ids[row], title=catalogue.titles[row]) for row in nearest]
        has_token = 0 < number <= len(trace.reasoning_tokens)
        return ReasoningStep(
            step=number,
            token=trace.reasoning_tokens[number - 1] if has_token else None,
            log_probability=trace.reasoning_log_probs[number - 1] if has_token else None,
            nearest_items=items,
        )

    near: Sequence[float | None] = trace.neighbour_scores or [None] * len(answer.items)
    near_weight = request.neighbours_weight
    items = zip(answer.items, trace.token_log_probs, trace.dense_scores, near, trace.similarity, strict=True)
    return Explanation(
        steps=[step(number, nearest) for number, nearest in enumerate(trace.nearest_items)],
        items=[
            ItemExplanation(
                item_id=catalogue.item_ids[row],
                token_log_probabilities=tokens,
                dense_score=dense,
                neighbour_score=by_neighbours,
                similarity=similarity,
            )
            for row, tokens, dense, by_neighbours, similarity in items
        ],
        dense_weight=bundle.dense_weight if request.dense_weight is None else request.dense_weight,
        neighbours_weight=bundle.neighbours_weight if near_weight is None else near_weight,
    )
