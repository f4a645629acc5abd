"""The playground, the operator's page, the API documentation, and their files. Nothing comes from another host."""

from __future__ import annotations

import asyncio
from pathlib import Path

import fastapi_offline
from fastapi import Request, Response
from fastapi.responses import FileResponse

from app.checks import open_router
from app.errors import NotFound

router = open_router(include_in_schema=False)

OWN = Path(__file__).parent.parent / "page"
SWAGGER = Path(fastapi_offline.__file__).parent / "static"  # only its copy of Swagger UI is used
NAMES = (
    "style.css", "script.js", "settings.js", "dial.js", "column.js", "service.js", "live.js", "picture.js",
    "metrics.js", "operator.js", "changes.js", "docs.css", "docs.js",
)  # fmt: skip
FILES = {name: OWN / name for name in NAMES}
FILES |= {name: SWAGGER / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")}
REVALIDATED = {"Cache-Control": "no-cache"}
CACHED_FOR_A_DAY = {"Cache-Control": "max-age=86400"}  # 1.5 MB that change with an upgrade only


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(OWN / "index.html", headers=REVALIDATED)


@router.get("/operator")
async def operator() -> FileResponse:
    return FileResponse(OWN / "operator.html", headers=REVALIDATED)


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(OWN / "docs.html", headers=REVALIDATED)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return Response(await asyncio.to_thread(request.app.state.openapi), media_type="application/json")


@router.get("/page/{name}")
async def file(name: str) -> FileResponse:
    path = FILES.get(name)
    if path is None:
        raise NotFound("There is no such file.")
    return FileResponse(path, headers=CACHED_FOR_A_DAY if path.parent == SWAGGER else REVALIDATED)
