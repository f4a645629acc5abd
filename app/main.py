"""Joins settings, service and routes into one application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app import errors
from app.lifecycle import Service
from app.load_shedder import LoadShedder
from app.metrics import Scrapes
from app.middleware import Cors, RequestMiddleware
from app.quotas import Quotas
from app.routes import (
    catalogues,
    feedback,
    health,
    inference_protocol,
    items,
    models,
    page,
    popular,
    recommend,
    scenarios,
    users,
)
from app.security import Hosts
from app.settings import Settings
from app.slot import WorkerSlot
from app.traces import Traces
from serving import __version__
from serving.online.searching import EngineLike
from serving.online.watchdog import LOOK_EVERY


async def _beat(slot: WorkerSlot) -> None:
    while True:
        slot.beat()
        await asyncio.sleep(LOOK_EVERY)


class Application(FastAPI):
    """FastAPI with our layers outermost. Its own around them answer errors and bound bodies, as `RequestMiddleware` has
    done by then, and would cost every request some microseconds."""

    def build_middleware_stack(self) -> ASGIApp:
        stack: Any = super().build_middleware_stack()
        while not isinstance(stack, self.user_middleware[0].cls):  # type: ignore[arg-type]  # all are classes
            stack = stack.app
        layers: ASGIApp = stack
        return layers


def create_app(
    settings: Settings,
    engine: EngineLike | None = None,
    on_ready: Callable[[Service], None] = lambda service: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    on_death: Callable[[BaseException], None] = lambda error: None,
    slot: WorkerSlot | None = None,
) -> FastAPI:
    """The application; `app.state.service` is its service. engine: serve this one instead of loading a bundle.

    on_ready, on_failure, on_death: called when the model is ready, when it could not be made ready, and when the
    engine's thread has died, on the event loop's thread or the engine's. slot: the worker's, where there are several.
    """
    service = Service(settings, engine, on_ready, on_failure, on_death)
    quotas, traces = Quotas(settings), Traces(settings.otlp_endpoint, __version__)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        while slot is not None and slot.is_replacement and service.status in ("loading", "warming", "replaying"):
            await asyncio.sleep(0.05)  # until then the other workers take all requests
        beating = asyncio.create_task(_beat(slot)) if slot is not None else None
        yield
        if beating is not None:
            beating.cancel()
        await service.close()
        await quotas.close()
        await asyncio.to_thread(traces.close)

    app = Application(
        title="streamrec",
        version=__version__,
        description="Recommendations from a sequence model that can reason before it names an item.",
        lifespan=lifespan,
        exception_handlers=errors.HANDLERS,
        openapi_url=None,  # FastAPI would render the document for every request; routes/page.py has it rendered once
        docs_url=None,  # FastAPI's page loads its scripts from another host; routes/page.py serves them itself
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,  # what clients call the operation
        redirect_slashes=False,  # it answers before a key is checked, with an address that the client made up
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours are in traces.py, metrics.py and logs.py
    )
    app.state.service, app.state.quotas, app.state.slot = service, quotas, slot
    app.state.scrapes = Scrapes(service.metrics)
    app.state.openapi = cache(lambda: json.dumps(app.openapi()).encode())
    for routes in (recommend, scenarios, users, feedback, items, popular, catalogues, models, health, page):
        app.include_router(routes.router)
    app.include_router(inference_protocol.server)
    app.include_router(inference_protocol.models)
    app.include_router(models.changes)
    app.include_router(items.changes)
    app.include_router(catalogues.changes)
    app.include_router(scenarios.changes)
    app.add_middleware(recommend.ahead_of)  # each one added is outside those before
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(
        RequestMiddleware,
        metrics=service.metrics,
        traces=traces,
        hosts=Hosts(settings),
        max_body_bytes=settings.max_body_bytes,
    )
    app.add_middleware(LoadShedder, service=service, quotas=quotas)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    return app
