"""Health and metadata as the Open Inference Protocol (version 2) of KServe has them, for platforms that look there.

Recommendations are no tensors, so there is no `/infer`: they are asked for at `POST /recommend`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from app.checks import keyed_router, open_router
from app.deps import ServiceDep
from app.errors import NotFound, declared
from app.lifecycle import Service
from app.routes.health import is_alive, state_of
from app.schemas.inference_protocol import ModelMetadata, ModelReady, ServerMetadata, Tensor
from app.schemas.models import MAX_VERSION_LENGTH
from serving import __version__

Name = Annotated[str, Path(min_length=1, max_length=MAX_VERSION_LENGTH, description="of a bundle")]

# What a recommendation is made from and what it is, as far as tensors can say it.
INPUTS = [Tensor(name="history", datatype="BYTES", shape=[-1])]
OUTPUTS = [Tensor(name="item_id", datatype="BYTES", shape=[-1]), Tensor(name="score", datatype="FP32", shape=[-1])]

server = open_router(prefix="/v2", tags=["inference protocol"])
models = keyed_router(prefix="/v2/models", tags=["inference protocol"], responses=declared(404, 422))


@server.get("/health/live", responses={503: {}})
async def server_live(service: ServiceDep) -> Response:
    """As `/livez`."""
    live = is_alive(service)
    return JSONResponse({"live": live}, 200 if live else 503)


@server.get("/health/ready", responses={503: {}})
async def server_ready(request: Request) -> Response:
    """As `/readyz`."""
    ready = state_of(request) == "ready"
    return JSONResponse({"ready": ready}, 200 if ready else 503)


@server.get("", response_model=ServerMetadata)
async def server_metadata() -> ServerMetadata:
    """The name and version of this program."""
    return ServerMetadata(name="streamrec", version=__version__, extensions=[])


# Ahead of the route for a model: one whose name ends in "/ready" is not found by it.
@models.get("/{name:anything}/ready", response_model=ModelReady)
async def model_ready(name: Name, service: ServiceDep) -> ModelReady:
    """Whether a bundle of this name is loaded. What is loaded has been warmed up."""
    _versions(service, name)
    return ModelReady(name=name, ready=True)


@models.get("/{name:anything}", response_model=ModelMetadata)
async def model_metadata(name: Name, service: ServiceDep) -> ModelMetadata:
    """The loaded versions of a bundle, and what goes in and comes out; `/models` says more."""
    return ModelMetadata(
        name=name, versions=_versions(service, name), platform="streamrec", inputs=INPUTS, outputs=OUTPUTS
    )


def _versions(service: Service, name: str) -> list[str]:
    service.check_ready()
    found = [version for version, model in service.models.loaded.items() if model.bundle.name == name]
    if not found:
        raise NotFound("No bundle of this name is loaded; GET /models lists those that are.")
    return found
