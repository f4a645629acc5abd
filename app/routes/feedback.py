"""What people do with recommendations: taken, counted by model, source and steps, and summed up."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict

from app.checks import keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.metrics import Metrics
from app.schemas.feedback import FeedbackRequest, FeedbackResponse, FeedbackSummaries, FeedbackSummary, Rate
from serving.errors import RequestError
from serving.online import receipts

Z = 1.96  # of a 95% interval

router = keyed_router(prefix="/feedback", tags=["feedback"])


@router.post("", response_model=FeedbackResponse, responses=declared(413, 415, 422))
async def give_feedback(body: FeedbackRequest, service: ServiceDep) -> FeedbackResponse:
    """Report what somebody did with a recommended item. Acknowledged only once stored, and counted once however often
    it is sent: after a 503, send it again."""
    service.check_ready()
    receipt = receipts.read(body.recommendation_id, service.settings.user_secret)
    now = time.time()
    if now - receipt.at > service.settings.feedback_window_s:
        raise RequestError("The recommendation is too old for feedback; send it sooner.", "recommendation_id")
    position = receipt.position(body.item_id)
    if position is None:
        raise RequestError("The recommendation does not have this item; send one that it has.", "item_id")
    record = {
        "recommendation_id": body.recommendation_id,
        "user": receipt.user,
        "item_id": body.item_id,
        "event": body.event,
        "value": body.value,
        "time": now if body.time is None else body.time,
        "position": position,
        "version": receipt.version,
        "source": receipt.source,
        "steps": receipt.steps,
    }
    added = await service.feedback.add(body.recommendation_id, record, is_hit=body.event != "impression")
    if added.is_new:
        await service.happened(receipt.user, body.item_id, body.event)
    service.metrics.took_feedback(receipt.version, receipt.source, receipt.steps, body.event, added)
    return FeedbackResponse(counted=added.is_new, position=position, kept=service.feedback.is_kept)


@router.get("/summary", response_model=FeedbackSummaries, responses=declared())
async def summarise_feedback(service: ServiceDep) -> FeedbackSummaries:
    """Hit rate and click-through rate by model, source and reasoning steps, with intervals: of all workers of this
    replica, since its start. Prometheus has the counters, of all replicas and any time."""
    service.check_ready()
    return FeedbackSummaries(summaries=await asyncio.to_thread(summaries, service.metrics))


def summaries(metrics: Metrics) -> list[FeedbackSummary]:
    counts: defaultdict[tuple[str, str, int], defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for sample in metrics.samples(
        "streamrec_recommendations_total", "streamrec_hits_total", "streamrec_feedback_total"
    ):
        labels = sample.labels
        of = counts[labels["version"], labels["source"], int(labels["steps"])]
        of[labels.get("event", sample.name)] += int(sample.value)
    return [_summary(*key, found) for key, found in sorted(counts.items())]


def _summary(version: str, source: str, steps: int, counts: defaultdict[str, int]) -> FeedbackSummary:
    recommendations, hits = counts.pop("streamrec_recommendations_total", 0), counts.pop("streamrec_hits_total", 0)
    return FeedbackSummary(
        version=version,
        source=source,
        reasoning_steps=steps,
        recommendations=recommendations,
        events=counts,
        hit_rate=rate(hits, recommendations),
        click_through_rate=rate(counts["click"], counts["impression"]),
    )


def rate(cases: int, of: int) -> Rate | None:
    """The share with its 95% Wilson score interval; None without anything to share. More cases than there can be, as
    after a restart that forgot what it recommended, count as all."""
    if of == 0:
        return None
    share = min(1.0, cases / of)
    centre, spread = share + Z**2 / (2 * of), Z * math.sqrt(share * (1 - share) / of + Z**2 / (4 * of**2))
    scale = 1 + Z**2 / of
    return Rate(share=share, low=max(0.0, (centre - spread) / scale), high=min(1.0, (centre + spread) / scale))
