"""POST /recommend, /recommend/batch and /rank."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError, WithJsonSchema
from starlette.datastructures import QueryParams
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app import answers, errors
from app.body import read_body
from app.checks import check_body, check_query, keyed_router
from app.deps import ServiceDep, while_connected
from app.lifecycle import Service
from app.schemas.answers import ANSWER, BatchResponse, RecommendResponse
from app.schemas.common import Problem
from app.schemas.recommend import BatchRequest, RankRequest, RecommendRequest
from app.security import require_key
from serving.errors import RequestError, ServingError
from serving.online.models import Assigned
from serving.steps import Steps

log = logging.getLogger("streamrec.recommend")

SearchBody = RecommendRequest | RankRequest

MAX_STEPS_LENGTH = 16  # characters

router = keyed_router(
    tags=["recommend"],
    responses=errors.declared(404, 413, 415, 422, 504),
)


async def reasoning_steps(
    reasoning_steps: Annotated[
        str | None,
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"const": "auto"}]}),
        Query(
            description="0 to the model's maximum; auto: the most that gain something and fit the time budget; "
            "default: the model's default",
            max_length=MAX_STEPS_LENGTH,
        ),
    ] = None,
) -> Steps:
    return _steps(reasoning_steps)


def _steps(requested: str | None) -> Steps:
    if requested is None or requested == "auto":
        return requested  # type: ignore[return-value]
    if not (requested.isascii() and requested.isdigit() and len(requested) <= MAX_STEPS_LENGTH):
        raise RequestError("Give a number of steps, 0 or more, or auto.", "reasoning_steps")
    return int(requested)


StepsDep = Annotated[Any, Depends(reasoning_steps)]


@router.post("/recommend", response_model=RecommendResponse)
async def recommend(request: Request, body: RecommendRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """The best items for one user, after a number of reasoning steps."""
    return await _answered(request, body, steps, service)


@router.post("/rank", response_model=RecommendResponse)
async def rank(request: Request, body: RankRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """Given items in the order in which one user wants them, the best first, with the scores that `/recommend` gives
    them. For retrieval by something else: nothing is searched for, and no item is left out, however unlikely it is.
    A user of whom nothing is known gets them by popularity."""
    return await _answered(request, body, steps, service)


async def _answered(request: Request, body: SearchBody, steps: Steps, service: Service) -> Response:
    assigned = _assigned(request, body, steps, service)
    await _charge(request, assigned, service)
    answer = await while_connected(request, answers.recommend(service.models, assigned, service.settings.user_secret))
    if answer is None:
        return Response(status_code=499)  # the client has gone
    request.state.answer = answer  # for the trace
    return _json(answer, service)


def _assigned(request: Request, body: SearchBody, steps: Steps, service: Service) -> Assigned:
    """The query of a request, its scenario's presets in it, and the model that answers it."""
    if isinstance(body, RecommendRequest) and body.scenario is not None:
        body, steps = service.scenarios.complete(body, steps)
    return service.models.assign(answers.to_query(body, steps, request.state.client, service.settings.user_secret))


async def _charge(request: Request, assigned: Assigned, service: Service) -> None:
    if service.settings.work_quota:
        await request.app.state.quotas.take_work(request.state.client, answers.work_of(assigned))


class _Direct:
    """What answers a route's requests, as an application: Starlette would wrap a function once more."""

    def __init__(self, schema: type[SearchBody]) -> None:
        self._schema = schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        service: Service = request.app.state.service
        await require_key(request)
        steps = _steps_in(scope["query_string"])
        check_body(scope["headers"], service.settings.max_body_bytes)
        # Before reading: under a flood, refusals are most of the work.
        service.admission.decide(client=request.state.client)
        body = _parsed(self._schema, await read_body(receive))
        response = await _answered(request, body, steps, service)
        await response(scope, receive, send)


def ahead_of(app: ASGIApp) -> ASGIApp:
    """Answers requests to these two paths in place of the routes above, which document them in OpenAPI, and leaves the
    rest to `app`. FastAPI's layers, validation and dependencies cost more than everything else in HTTP."""
    routes = {
        "/recommend": Route("/recommend", _Direct(RecommendRequest), methods=["POST"]),
        "/rank": Route("/rank", _Direct(RankRequest), methods=["POST"]),
    }

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in routes:
            await app(scope, receive, send)
            return
        scope["route"] = route = routes[scope["path"]]
        try:
            await route.handle(scope, receive, send)
        except errors.EXPECTED as error:
            response = await errors.handle(Request(scope), error)
            await response(scope, receive, send)

    return answer


@lru_cache(64)  # there are few different queries
def _steps_in(query: bytes) -> Steps:
    check_query(query, {"reasoning_steps"})
    return _steps(QueryParams(query).get("reasoning_steps"))


def _parsed(schema: type[SearchBody], body: bytes) -> SearchBody:
    with suppress(ValidationError):  # what fails is parsed again below, for errors worded as on every other route
        return schema.model_validate_json(body)
    try:
        return schema.model_validate(json.loads(body))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except (ValueError, RecursionError) as error:
        raise RequestError("The body is not JSON.", "body") from error


@router.post("/recommend/batch", response_model=BatchResponse)
async def recommend_batch(request: Request, body: BatchRequest, steps: StepsDep, service: ServiceDep) -> Response:
    """Many requests in one call; each gets its own answer or its own problem details."""
    quotas = request.app.state.quotas
    limit = min(service.settings.max_batch_users, quotas.largest)  # waiting would not help beyond a quota either
    if len(body.requests) > limit:
        raise RequestError(f"One call takes at most {limit} requests; split them into several calls.", "requests")
    await quotas.take(request.state.client, len(body.requests) - 1)  # one is counted already, for the call
    service.check_ready()
    work = asyncio.gather(*(_one(request, service, raw, steps) for raw in body.requests))
    results = await while_connected(request, _awaited(work))
    return Response(status_code=499) if results is None else _json(BatchResponse(results=results), service)


async def _awaited(work: asyncio.Future[list[RecommendResponse | Problem]]) -> list[RecommendResponse | Problem]:
    return await work


async def _one(request: Request, service: Service, raw: Any, steps: Steps) -> RecommendResponse | Problem:
    try:
        body = RecommendRequest.model_validate(raw)
        assigned = _assigned(request, body, steps, service)
        await _charge(request, assigned, service)
        return await answers.recommend(service.models, assigned, service.settings.user_secret)
    except (ServingError, ValidationError, RequestValidationError) as error:
        details = errors.problem(error)
    except Exception as error:
        log.exception("unexpected error")
        details = errors.problem(error)
    if details.status in errors.REJECTIONS:
        service.metrics.rejections(errors.reason(details)).inc()
    return details


def _json(answer: RecommendResponse | BatchResponse, service: Service) -> Response:
    started = time.perf_counter()
    body = answer.model_dump_json() if isinstance(answer, BatchResponse) else ANSWER.dump_json(answer)
    service.metrics.stages["serialise"].observe(time.perf_counter() - started)
    return Response(body, media_type="application/json")
