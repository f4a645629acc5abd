"""POST /recommend and /recommend/batch."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from app import errors
from app.deps import ServiceDep, while_connected
from app.schemas import BatchRequest, BatchResponse, Problem, RecommendRequest, RecommendResponse
from app.security import bearer, header, require_key
from app.service import Service, Steps
from serving.errors import RequestError, ServingError

log = logging.getLogger("streamrec.recommend")

LONGEST = 16


router = APIRouter(
    tags=["recommend"],
    dependencies=[Depends(require_key)],
    responses=errors.declared(404, 413, 422, 504),
)


async def reasoning_steps(
    reasoning_steps: Annotated[
        str | None,
        Query(description="0 to the model's maximum, or auto; default: the model's", max_length=LONGEST),
    ] = None,
) -> Steps:
    if reasoning_steps is None or reasoning_steps == "auto":
        return reasoning_steps  # type: ignore[return-value]
    if not (reasoning_steps.isascii() and reasoning_steps.isdigit() and len(reasoning_steps) <= LONGEST):
        raise RequestError("Give a number of steps from 0, or auto.", "reasoning_steps")
    return int(reasoning_steps)


StepsDep = Annotated[Any, Depends(reasoning_steps)]


async def recommend(request: Request, body: RecommendRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """The best items for one user, found by reasoning for a number of steps first."""
    answer = await while_connected(request, service.recommend(body, steps))
    if answer is None:
        return Response(status_code=499)  # nobody reads this
    request.state.answer = answer  # for the trace
    return _json(answer, service)


class Direct(APIRoute):
    """Calls `recommend` as FastAPI would, without its resolving of dependencies: at every request that costs more than
    all the rest of HTTP. What OpenAPI tells still comes from the endpoint's signature."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            await require_key(request, await header(request), await bearer(request))
            steps = await reasoning_steps(request.query_params.get("reasoning_steps"))
            return await recommend(request, await _body(request), steps, request.app.state.service)

        return handle


async def _body(request: Request) -> RecommendRequest:
    if "json" not in request.headers.get("content-type", ""):
        raise RequestError("Send JSON, with the header Content-Type: application/json.", "body")
    try:
        return RecommendRequest.model_validate(json.loads(await request.body()))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except (ValueError, RecursionError) as error:
        raise RequestError("The body is no JSON.", "body") from error


router.add_api_route(
    "/recommend", recommend, methods=["POST"], response_model=RecommendResponse, route_class_override=Direct
)


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
