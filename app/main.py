"""Joins settings, service and routes into one application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import errors
from app.middleware import Envelope
from app.routes import health, items, models, page, recommend, users
from app.service import EngineLike, Service
from app.settings import Settings

VERSION = "0.1.0"


def create_app(
    settings: Settings,
    engine: EngineLike | None = None,
    on_ready: Callable[[Service], None] = lambda service: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """The application; `app.state.service` is its service. With `engine` no bundle is loaded.

    on_ready, on_failure: called on the engine's thread when the model is ready, or could not be made ready.
    """
    service = Service(settings, engine, on_ready, on_failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="streamrec",
        version=VERSION,
        description="Recommendations from a sequence model that may reason before it names an item.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    for routes in (recommend, users, items, models, health, page):
        app.include_router(routes.router)
    app.add_middleware(Envelope, metrics=service.metrics, max_body_bytes=settings.max_body_bytes)
    return app
