"""The client of the service, for Python: `Client`, and `AsyncClient` with the same methods to be awaited.

    with Client("http://127.0.0.1:8000", key="…") as streamrec:
        answer = streamrec.recommend(history=["i1", "i2"], k=5, reasoning_steps="auto")
        print([item["item_id"] for item in answer["items"]])

It needs httpx and nothing else. A method takes the fields of the body and the parameters of the query by name; what
it returns is the answer's JSON, with types (`streamrec.models`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Literal

from streamrec.models import Problem, RecommendRequest, RecommendResponse
from streamrec.operations import AsyncOperations, Operations
from streamrec.transport import NotFound, ServiceError, Unavailable

__all__ = ["AsyncClient", "Client", "NotFound", "ServiceError", "Unavailable"]

Steps = int | Literal["auto"] | None
BATCH = 100  # requests in one call; a service's STREAMREC_MAX_BATCH_USERS may permit more


class Client(Operations):
    """Calls that block; safe to share between threads."""

    def recommend_many(
        self, requests: Iterable[RecommendRequest], reasoning_steps: Steps = None, batch: int = BATCH
    ) -> Iterator[RecommendResponse | Problem]:
        """An answer or its own problem for each request, in their order, sent `batch` at a time."""
        for some in _parts(requests, batch):
            yield from self.recommend_batch(requests=some, reasoning_steps=reasoning_steps)["results"]


class AsyncClient(AsyncOperations):
    """Calls to be awaited."""

    async def recommend_many(
        self, requests: Iterable[RecommendRequest], reasoning_steps: Steps = None, batch: int = BATCH
    ) -> AsyncIterator[RecommendResponse | Problem]:
        """An answer or its own problem for each request, in their order, sent `batch` at a time."""
        for some in _parts(requests, batch):
            for result in (await self.recommend_batch(requests=some, reasoning_steps=reasoning_steps))["results"]:
                yield result


def _parts(requests: Iterable[RecommendRequest], size: int) -> Iterator[list[RecommendRequest]]:
    left = iter(requests)
    while some := list(islice(left, size)):
        yield some
