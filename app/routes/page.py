"""The playground page, the documentation page, and their files. Nothing on them comes from another host."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from app.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "page"
FILES = {"style.css", "script.js", "picture.js", "metrics.js", "docs.js"}
REVALIDATED = {"Cache-Control": "no-cache"}


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=REVALIDATED)


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(FOLDER / "docs.html", headers=REVALIDATED)


@router.get("/page/{name}")
async def file(name: str) -> FileResponse:
    if name not in FILES:
        raise NotFound("The page has no such file.")
    return FileResponse(FOLDER / name, headers=REVALIDATED)
