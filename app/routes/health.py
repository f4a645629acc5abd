"""Probes and metrics."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.checks import open_router
from app.deps import ServiceDep
from app.lifecycle import Service
from app.slot import WorkerSlot

router = open_router(tags=["health"])


@router.get("/livez", responses={503: {}})
async def livez(service: ServiceDep) -> Response:
    """503 once the engine is dead (ended, hung, or failing at everything): only a restart helps then."""
    return JSONResponse({"status": service.status}, 200 if is_alive(service) else 503)


@router.get("/readyz", responses={503: {}})
async def readyz(request: Request, service: ServiceDep) -> Response:
    """200 when requests are answered; else 503 with the reason: loading, warming, replaying (changes made before the
    start), draining or engine dead. With several workers, any of them reports for all that accept requests. `redis`
    says why Redis is not used, if it should be."""
    status = state_of(request)
    if status == "ready":
        return JSONResponse({"status": status} | ({"redis": service.redis_trouble} if service.redis_trouble else {}))
    return JSONResponse({"status": status, "reason": status}, 503, {"Retry-After": "1"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics. With several workers: the sum over all."""
    return Response(await request.app.state.scrapes.text(), media_type=CONTENT_TYPE_LATEST)


def is_alive(service: Service) -> bool:
    return service.status != "engine dead"


def state_of(request: Request) -> str:
    """The state of this process; where it is ready, that of a worker beside it which is not."""
    status: str = request.app.state.service.status
    slot: WorkerSlot | None = request.app.state.slot
    if status == "ready" and slot is not None:
        status = slot.blocking_state() or status
    return status
