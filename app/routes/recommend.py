"""POST /recommend and /recommend/batch."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import ValidationError

from app import errors
from app.deps import ServiceDep, while_connected
from app.schemas import BatchRequest, BatchResponse, Problem, RecommendRequest, RecommendResponse
from app.security import require_key
from app.service import Service, Steps
from serving.errors import RequestError, ServingError

log = logging.getLogger("streamrec.recommend")

router = APIRouter(
    tags=["recommend"],
    dependencies=[Depends(require_key)],
    responses=errors.declared(404, 413, 422, 504),
)


async def reasoning_steps(
    reasoning_steps: Annotated[
        str | None, Query(description="0 to the model's maximum, or auto; default: the model's", max_length=16)
    ] = None,
) -> Steps:
    if reasoning_steps is None or reasoning_steps == "auto":
        return reasoning_steps  # type: ignore[return-value]
    if not (reasoning_steps.isascii() and reasoning_steps.isdigit()):
        raise RequestError("Give a number of steps from 0, or auto.", "reasoning_steps")
    return int(reasoning_steps)


StepsDep = Annotated[Any, Depends(reasoning_steps)]


@router.post("/recommend", response_model=RecommendResponse)
async def recommend(request: Request, body: RecommendRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """The best items for one user, found by reasoning for a number of steps first."""
    answer = await while_connected(request, service.recommend(body, steps))
    if answer is None:
        return Response(status_code=499)  # nobody reads this
    request.state.answer = answer  # for the trace
    return _json(answer, service)


@router.post("/recommend/batch", response_model=BatchResponse)
async def recommend_batch(request: Request, body: BatchRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """Many users in one call; each gets its own answer, or its own problem."""
    limit = service.settings.max_batch_users
    if len(body.requests) > limit:
        raise RequestError(f"At most {limit} requests fit one call; send them in parts.", "requests")
    await request.app.state.quotas.take(request.state.client, len(body.requests) - 1)  # the call itself is one
    service.check_ready()
    work = asyncio.gather(*(_one(service, raw, steps) for raw in body.requests))
    results = await while_connected(request, _awaited(work))
    return Response(status_code=499) if results is None else _json(BatchResponse(results=results), service)


async def _awaited(work: asyncio.Future[list[RecommendResponse | Problem]]) -> list[RecommendResponse | Problem]:
    return await work


async def _one(service: Service, raw: Any, steps: Steps) -> RecommendResponse | Problem:
    try:
        return await service.recommend(RecommendRequest.model_validate(raw), steps)
    except (ServingError, ValidationError) as error:
        details = errors.problem(error)
    except Exception as error:
        log.exception("unexpected error")
        details = errors.problem(error)
    if details.status in errors.REJECTIONS:
        service.metrics.rejected.labels(errors.reason(details)).inc()
    return details


def _json(answer: RecommendResponse | BatchResponse, service: Service) -> Response:
    started = time.perf_counter()
    body = answer.model_dump_json()
    service.metrics.stage_seconds.labels("serialise").observe(time.perf_counter() - started)
    return Response(body, media_type="application/json")
