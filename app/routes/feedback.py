"""What people do with recommendations: taken, and summed up."""

from __future__ import annotations

import asyncio
import time

from app.checks import keyed_router
from app.deps import ServiceDep
from app.errors import declared
from app.feedback_summary import summaries
from app.schemas.feedback import FeedbackRequest, FeedbackResponse, FeedbackSummaries
from serving.errors import RequestError
from serving.online import receipts

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
    added = await service.feedback.add(body.recommendation_id, record)
    if added.is_new:
        await service.record_feedback(receipt.user, body.item_id, body.event)
    service.metrics.took_feedback(receipt.version, receipt.source, receipt.steps, body.event, added)
    return FeedbackResponse(counted=added.is_new, position=position, kept=service.feedback.is_kept)


@router.get("/summary", response_model=FeedbackSummaries, responses=declared())
async def summarise_feedback(service: ServiceDep) -> FeedbackSummaries:
    """Hit rate and click-through rate by model, source and reasoning steps, with intervals: of all workers of this
    replica, since its start. Prometheus has the counters, of all replicas and any time."""
    service.check_ready()
    return FeedbackSummaries(summaries=await asyncio.to_thread(summaries, service.metrics))
