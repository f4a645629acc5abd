"""The playground page and its two files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "page"
CACHED = {"Cache-Control": "no-cache"}


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=CACHED)


@router.get("/page/style.css")
async def style() -> FileResponse:
    return FileResponse(FOLDER / "style.css", headers=CACHED)


@router.get("/page/script.js")
async def script() -> FileResponse:
    return FileResponse(FOLDER / "script.js", headers=CACHED)
