"""Joins settings, service and routes into one application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from app import errors
from app.lifecycle import EngineLike, Service
from app.middleware import Cors, Envelope
from app.quotas import Quotas
from app.routes import health, items, models, page, recommend, users
from app.settings import Settings
from app.slot import WorkerSlot
from app.traces import Traces
from serving import __version__


class App(FastAPI):
    """FastAPI from our outermost layer inwards: its own around that do once more what `Envelope` does."""

    def build_middleware_stack(self) -> ASGIApp:
        layer: Any = super().build_middleware_stack()
        while not isinstance(layer, Envelope):
            layer = layer.app
        return layer


def create_app(
    settings: Settings,
    engine: EngineLike | None = None,
    on_ready: Callable[[Service], None] = lambda service: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    on_death: Callable[[BaseException], None] = lambda error: None,
    slot: WorkerSlot | None = None,
) -> FastAPI:
    """The application; `app.state.service` is its service. With `engine` no bundle is loaded.

    on_ready, on_failure, on_death: called on the engine's thread when the model is ready, could not be made ready, or
    whenever that thread has ended by a fault. slot: of a worker among several.
    """
    service = Service(settings, engine, on_ready, on_failure, on_death)
    quotas, traces = Quotas(settings), Traces(settings.otlp_endpoint, __version__)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        while slot is not None and slot.is_replacement and service.status in ("loading", "warming"):
            await asyncio.sleep(0.05)  # the other workers answer meanwhile
        yield
        await service.close()
        await quotas.close()
        await asyncio.to_thread(traces.close)

    app = App(
        title="streamrec",
        version=__version__,
        description="Recommendations from a sequence model that may reason before it names an item.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its scripts from another host; ours is in routes/page.py
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours are in traces.py, metrics.py and logs.py
    )
    app.state.service, app.state.quotas, app.state.slot = service, quotas, slot
    errors.install(app)
    for routes in (recommend, users, items, models, health, page):
        app.include_router(routes.router)
    app.add_middleware(recommend.Shortcut, service=service)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(Envelope, metrics=service.metrics, traces=traces, max_body_bytes=settings.max_body_bytes)
    return app
