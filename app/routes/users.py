"""What is known about a user: append events, read, erase."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import Response

from app.answers import to_history
from app.checks import keyed_router
from app.deps import ServiceDep, UserId
from app.errors import NotFound, declared
from app.schemas.common import HistoryEvent
from app.schemas.users import EventsRequest, EventsResponse, UserResponse
from serving.items.events import read_events

router = keyed_router(
    prefix="/users",
    tags=["users"],
    responses=declared(413, 415, 422),
)


@router.post("/{user_id:anything}/events", response_model=EventsResponse)
async def append_events(user_id: UserId, body: EventsRequest, service: ServiceDep) -> EventsResponse:
    """Append items to the user's history. Acknowledged only once stored; after a 503, check whether they were."""
    service.check_ready()
    history = to_history(body.items)
    length = await service.users.append(user_id, history)
    service.count(read_events(history, service.bundle.settings.type_weights)[0])
    items = list(dict.fromkeys(item if isinstance(item, str) else item.item_id for item in body.items))
    rows = service.bundle.catalogue.present_rows(items)
    return EventsResponse(
        user_id=user_id,
        stored=len(body.items),
        history_length=length,
        unknown_items=[item for item, row in zip(items, rows, strict=True) if row is None],
    )


@router.get("/{user_id:anything}", response_model=UserResponse, responses=declared(404))
async def read_user(user_id: UserId, service: ServiceDep) -> UserResponse:
    """Everything that is kept about a user. This looks through the feedback of all users: ask when somebody wants to
    know what is kept of them, not for every page."""
    history, cached = await service.users.get(user_id), await service.recommender.held(user_id)
    shown, feedback = await service.shown(user_id), await service.feedback_kept(user_id)
    if not (history or cached or shown or feedback):
        raise NotFound("Nothing is kept about this user.")
    items = [item if isinstance(item, str) else HistoryEvent(**asdict(item)) for item in history]
    return UserResponse(user_id=user_id, items=items, cached=cached, shown=shown, feedback=feedback)


@router.delete("/{user_id:anything}", status_code=204)
async def erase_user(user_id: UserId, service: ServiceDep) -> Response:
    """Erase everything kept about a user, known history, encoded histories, feedback and impressions: in Redis and
    files at once, in other processes within moments. After a 503 something may be left: send the request again."""
    await service.erase_user(user_id)
    return Response(status_code=204)
