"""Dependencies of the routes: the service, ids in paths, and work that stops when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request
from starlette.convertors import Convertor, register_url_convertor

from app.lifecycle import Service
from app.schemas.common import FilterText, Id
from serving.online import query as online
from serving.types import MAX_ID_LENGTH

T = TypeVar("T")

MOST_NAMED = 100  # ids in a query
DISCONNECT_GRACE_S = 0.25  # most requests are answered by then; watching from the start would cost a tenth of HTTP


async def get_service(request: Request) -> Service:  # async: FastAPI runs plain functions in a thread
    service: Service = request.app.state.service
    return service


class Anything(Convertor[str]):
    """The rest of a path, if any, slashes and line breaks included. Starlette's `path` stops before a trailing line
    break, and would then mistake one user for another."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", Anything())  # for routes like /users/{user_id:anything}


async def listing_rules(
    allow: Annotated[
        list[Id] | None, Query(max_length=MOST_NAMED, description="only these; given several times")
    ] = None,
    deny: Annotated[list[Id] | None, Query(max_length=MOST_NAMED, description="none of these")] = None,
    categories: Annotated[
        list[Id] | None, Query(max_length=MOST_NAMED, description="only items in at least one of these")
    ] = None,
    catalogue: Annotated[Id | None, Query(description="only items of this named subset")] = None,
    filter: Annotated[FilterText | None, Query(description="only items that pass this filter")] = None,
) -> online.Query:
    """The rules in the query of a list that is no user's own."""
    return online.Query(allow=allow, deny=deny or (), categories=categories or (), catalogue=catalogue, filter=filter)


RulesDep = Annotated[online.Query, Depends(listing_rules)]
ServiceDep = Annotated[Service, Depends(get_service)]
UserId = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH)]
ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; or None, with the work cancelled, once the client has disconnected.

    Disconnects are noticed only after DISCONNECT_GRACE_S."""
    task = asyncio.current_task()
    watch: asyncio.Task[None] | None = None
    assert task is not None

    def begin() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(_cancel_when_gone(request, task))

    timer = asyncio.get_running_loop().call_later(DISCONNECT_GRACE_S, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if watch is None or not watch.done():  # cancelled by somebody else: the server is stopping
            raise
        task.uncancel()
        return None
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()


async def _cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()
