"""What routes ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request
from starlette.convertors import Convertor, register_url_convertor

from app.schemas import MAX_ID
from app.service import Service

T = TypeVar("T")


async def get_service(request: Request) -> Service:  # async: FastAPI sends plain functions to a thread
    return request.app.state.service


class Anything(Convertor[str]):
    """The rest of a path, slashes and line breaks included. Starlette's `path` stops before a line break at the end,
    and so takes one user for another."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", Anything())  # for routes like /users/{user_id:anything}

ServiceDep = Annotated[Service, Depends(get_service)]
UserId = Annotated[str, Path(min_length=1, max_length=MAX_ID)]
ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result, or None, the work cancelled, when the client has gone: nobody would read the answer."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
