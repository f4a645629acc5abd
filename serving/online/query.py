"""What a client asks for, and the same in catalogue rows: what the search and the lists of popular items need of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from serving.bundle import Bundle
from serving.errors import FilterError
from serving.items.catalogue import Catalogue
from serving.items.events import read_events
from serving.online.admission import Plan
from serving.steps import Steps
from serving.types import Boost, Event, EventData, Request, Rules


@dataclass(slots=True)
class Query:
    """What a client asks for, in item ids. None stands for the default of the bundle or of the service.

    history: item ids and events, oldest first; empty: what is known of the user. timeout: time budget in seconds.
    rank_only: score every permitted item of `allow`, and search for none. boosts: filters, and the factors by which
    they multiply what the items that pass are worth. diversity, max_per_category: choose the k from all that the beams
    have found, and explore: keep so many of them for new items (`serving/online/diversity.py`). rotation: how far items
    go down that the user was shown lately and did not take (`serving/online/impressions.py`). shown: marks of what the
    pages before had (`serving/online/receipts.py`); the k items are those behind them. client: who asks; clients share
    the engine's time.
    """

    history: Sequence[str | Event] = ()
    user_id: str | None = None
    k: int = 10
    beam_width: int | None = None
    steps: Steps = None
    paths: int | None = None
    exclude_seen: bool = True
    allow: Sequence[str] | None = None
    deny: Sequence[str] = ()
    categories: Sequence[str] = ()
    catalogue: str | None = None
    filter: str | None = None
    boosts: Sequence[tuple[str, float]] = ()
    dense_weight: float | None = None
    neighbours_weight: float | None = None
    timeout: float | None = None
    explain: bool = False
    rank_only: bool = False
    diversity: float = 0.0
    max_per_category: int | None = None
    explore: int = 0
    rotation: float = 0.0
    shown: Sequence[int] = ()
    client: Hashable = None

    @property
    def length(self) -> int:
        """Of the list, with the pages before."""
        return len(self.shown) + self.k

    def found(self, beam_width: int) -> int:
        """How many items a search of so many beams has to find."""
        chooses = self.diversity or self.max_per_category is not None or self.rotation
        return beam_width if chooses else min(self.length, beam_width)


@dataclass(slots=True)
class Resolved:
    """A query in catalogue rows: the newest items of the history, the rules, the ids nobody knows, the items to rank,
    if that is all that is asked for, and what is known of the history's events."""

    history: tuple[int, ...]
    rules: Rules
    unknown_items: list[str]
    items: tuple[int, ...] | None = None
    events: EventData | None = None
    boosts: tuple[Boost, ...] = ()


def resolve(bundle: Bundle, query: Query, history: Sequence[str | Event]) -> Resolved:
    """The query in catalogue rows. Ids that the catalogue does not have are ignored and listed, and so are removed
    items outside the history; an event of a type that the bundle leaves out is as if it had not happened.

    Raises UnknownCatalogue and RequestError for a named subset or a category that does not exist, and FilterError.
    """
    catalogue = bundle.catalogue
    unknown: dict[str, None] = {}

    def rows(ids: Sequence[str], look_up: Callable[[Sequence[str]], list[int | None]]) -> tuple[int, ...]:
        found = look_up(ids)
        if None not in found:
            return tuple(found)  # type: ignore[arg-type]
        unknown.update({item_id: None for item_id, row in zip(ids, found, strict=True) if row is None})
        return tuple(row for row in found if row is not None)

    ids, events = read_events(history, bundle.settings.type_weights)
    seen = rows(ids, catalogue.rows)
    if events is not None:
        is_known = [row is not None for row in catalogue.rows(ids)]
        events = events.of(is_known).of(slice(-bundle.max_items, None))
    rules = Rules(
        exclude=tuple(set(seen)) if query.exclude_seen else (),
        deny=rows(query.deny, catalogue.present_rows),
        allow=None if query.allow is None else rows(query.allow, catalogue.present_rows),
        categories=tuple(query.categories),
        catalogue=query.catalogue,
        filters=() if query.filter is None else (query.filter,),
    )
    rules = catalogue.resolve(rules, time.time())
    items = None
    if query.rank_only:
        allowed = rules.allow or ()
        items = tuple(allowed[index] for index in catalogue.permitted_indices(allowed, rules))
    boosts = boosts_of(catalogue, query)
    return Resolved(seen[-bundle.max_items :], rules, list(unknown), items, events, boosts)


def boosts_of(catalogue: Catalogue, query: Query) -> tuple[Boost, ...]:
    """Raises FilterError."""
    if not query.boosts:
        return ()
    now = time.time()
    found = []
    for number, (text, factor) in enumerate(query.boosts):
        try:
            found.append(catalogue.boost(text, factor, now))
        except FilterError as error:
            raise FilterError(error.fault, error.position, f"boost.{number}.filter") from error
    return tuple(boost for boost in found if boost.log_factor)


def to_request(query: Query, resolved: Resolved, plan: Plan) -> Request:
    """The search that answers a resolved query under a plan."""
    return Request(
        resolved.history,
        query.found(plan.beam_width),
        plan.beam_width,
        plan.steps,
        resolved.rules,
        dense_weight=query.dense_weight,
        neighbours_weight=query.neighbours_weight,
        explain=query.explain,
        paths=query.paths,
        items=resolved.items,
        explore=query.explore,
        boosts=resolved.boosts,
        events=resolved.events,
    )
