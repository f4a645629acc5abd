"""The way of a request: item ids to catalogue rows, cache, queue, search, and a checked answer. No HTTP in it.

    query -> resolve -> (nothing known: popularity) -> encoder state from the cache -> plan and queue -> search -> check

Offline scoring resolves, searches and checks with the same functions (`recommend_batch`), without cache and queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
from redis.exceptions import RedisError

from serving.bundle import Bundle
from serving.errors import FilterError, RequestError, StoreUnavailable
from serving.items.catalogue import Catalogue
from serving.items.events import read_events
from serving.items.live import LiveIndex
from serving.online import receipts
from serving.online.admission import Demand, Plan
from serving.online.batcher import Batcher
from serving.online.cache import Flight, Lookup, Source, StateCache
from serving.online.costs import CostTable
from serving.online.diversity import choose
from serving.online.impressions import Impressions, lowered
from serving.online.redis_link import RedisDown
from serving.online.similar import SimilarItems
from serving.online.trends import Ranked, boosted, filled
from serving.online.users import UserStore, digest
from serving.search.scoring import AT_ONCE
from serving.types import Answer, Boost, EncoderState, Event, EventData, Request, Rules, Trace, searches_of

log = logging.getLogger("streamrec.recommender")

T = TypeVar("T")
Steps = int | Literal["auto"] | None  # None: the bundle's default


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Catalogue rows, best first, and how they came about. `seconds`: per stage, `total` included."""

    items: list[int]
    scores: list[float]
    source: Literal["model", "popularity"]
    plan: Plan
    unknown_items: list[str]
    cache: Source = "off"
    seconds: dict[str, float] = field(default_factory=dict)
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The service's bounds and defaults. Seconds."""

    max_beam_width: int = 200
    default_beam_width: int = 50
    default_timeout: float = 10.0


@dataclass(frozen=True, slots=True)
class Resolved:
    """A query in catalogue rows: the newest items of the history, the rules, the ids nobody knows, the items to rank,
    if that is all that is asked for, and what is known of the history's events."""

    history: tuple[int, ...]
    rules: Rules
    unknown_items: list[str]
    items: tuple[int, ...] | None = None
    events: EventData | None = None
    boosts: tuple[Boost, ...] = ()


class EngineLike(Protocol):
    """What a request needs of an engine; `serving.engine.Engine` is the one there is."""

    bundle: Bundle

    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]: ...

    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]: ...

    def warm_up(self) -> None: ...

    @property
    def room(self) -> float: ...

    def refresh(self, rows: Sequence[int]) -> list[int]: ...

    def with_room(self) -> LiveIndex: ...

    def adopt(self, index: LiveIndex) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Search:
    """One request for the engine's thread: the engine that answers it, which stays as long as somebody waits, and the
    encoder state it shares with others of its user and history."""

    engine: EngineLike
    request: Request
    flight: Flight = field(default_factory=Flight)


class Observer:
    """What happens to requests, for whoever counts it. Does nothing by itself."""

    def batch_ran(self, searches: int, beam_rows: int, seconds: dict[str, float]) -> None:
        """seconds: of the stages encode, reason and decode."""

    def searched(self, steps: int, seconds: dict[str, float]) -> None:
        """A search was answered. seconds: of the stages queue and cache."""

    def answered(self, version: str, source: str, steps: int, seconds: float) -> None:
        """A query was answered by this version of the model, or by popularity; seconds: in all."""

    def shadowed(self, version: str, overlap: float) -> None:
        """The shadow found this share of the answer's items."""

    def shadow_failed(self, version: str, reason: str) -> None:
        """The shadow was not asked, or found nothing."""

    def fell_back(self, reason: str) -> None:
        """The answer, or the history behind it, did not come from where it should."""

    def dropped_invalid_items(self, count: int) -> None:
        """The search returned items that do not exist or are not permitted. Stays at zero."""


class Recommender:
    """Answers queries by an engine, behind a cache of encoder states and a queue. `user_secret` keys the digests that
    stand for users in caches. `runtime` names what runs the network: its states are used by its like alone.
    `cold_list` ranks what users of whom nothing is known get first; without it they get what the bundle has as popular.
    Without `impressions` no query may ask for rotation.

    Answers all come from one version of the model, that of the engine.
    """

    def __init__(
        self,
        engine: EngineLike,
        batcher: Batcher[Search, Answer],
        cache: StateCache,
        users: UserStore,
        limits: Limits,
        user_secret: bytes = b"",
        observer: Observer | None = None,
        runtime: str = "",
        cold_list: Callable[[Catalogue], Awaitable[Ranked]] | None = None,
        impressions: Impressions | None = None,
    ) -> None:
        self.engine, self.bundle = engine, engine.bundle
        self._batcher, self._cache, self._users, self._limits = batcher, cache, users, limits
        self._user_secret, self._observer, self._cold_list = user_secret, observer or Observer(), cold_list
        self._impressions = impressions
        self.similar = SimilarItems(self.bundle)
        self._state_version = f"{self.bundle.version} {runtime}"

    async def recommend(self, query: Query) -> Recommendation:
        """Raises serving's errors; whatever happens to Redis, an answer comes."""
        self._batcher.admission.check_open()
        started = time.monotonic()
        demand = self._demand(query, started)
        if query.user_id is not None:
            self._batcher.decide(demand)  # a refusal must not cost a look-up first
        erasures = self._cache.erasures
        resolved = resolve(self.bundle, query, query.history or await self._known_history(query.user_id))
        rotated = await self._rotated(query) if query.rotation else ()
        if not resolved.history:
            self._observer.fell_back("unknown_items" if resolved.unknown_items else "cold_user")
            ranked = None if self._cold_list is None else await self._cold_list(self.bundle.catalogue)
            return self._observed(popular(self.bundle, query, resolved, demand.beam_width, started, ranked, rotated))
        looked_up = time.monotonic()
        lookup = await self._look_up(query.user_id, resolved.history, erasures)
        cached = time.monotonic()

        def search(plan: Plan) -> Search:
            return Search(self.engine, to_request(query, resolved, plan), lookup.flight)

        outcome = await self._batcher.submit(demand, search)
        self._cache.put(lookup)
        seconds = {"queue": outcome.waited, "cache": cached - looked_up}
        self._observer.searched(outcome.plan.steps, seconds)
        answer = to_list(self.bundle, query, self._checked(outcome.result, resolved.rules, started), rotated)
        found = Recommendation(
            answer.items,
            answer.scores,
            "model",
            outcome.plan,
            resolved.unknown_items,
            lookup.source,
            seconds | answer.seconds | {"total": time.monotonic() - started},
            answer.trace,
        )
        return self._observed(found)

    def _observed(self, found: Recommendation) -> Recommendation:
        self._observer.answered(self.bundle.version, found.source, found.plan.steps, found.seconds["total"])
        return found

    def unobserved(self) -> Recommender:
        """The same model and users, without a trace in caches and metrics."""
        return Recommender(
            self.engine, self._batcher, StateCache(None, None), self._users, self._limits, self._user_secret
        )

    def item_ids(self, found: Recommendation) -> list[str]:
        ids = self.bundle.catalogue.item_ids
        return [ids[row] for row in found.items]

    def beam_width(self, query: Query) -> int:
        """How wide the search for a query is: wide enough for the pages before, as far as that is permitted. An item to
        rank costs about what a beam does; their number is rounded up, so that lists of similar length share batches."""
        if query.rank_only:
            return AT_ONCE * max(1, -(-len(query.allow or ()) // AT_ONCE))
        width = query.beam_width if query.beam_width is not None else max(query.k, self._limits.default_beam_width)
        return max(width, min(query.length, self._limits.max_beam_width)) if query.shown else width

    def _demand(self, query: Query, now: float) -> Demand:
        """A requested number of steps is kept. `auto` takes as many as fit the time budget; so does, up to the
        bundle's default, a query with a time budget and no steps."""
        bundle, limits = self.bundle, self._limits
        width = self.beam_width(query)
        if width > limits.max_beam_width and not query.rank_only:
            field = "k" if query.k > limits.max_beam_width else "beam_width"
            raise RequestError(f"This service allows at most {limits.max_beam_width}; ask for less.", field)
        if isinstance(query.steps, int) and not 0 <= query.steps <= bundle.max_steps:
            raise RequestError(f"This model takes 0 to {bundle.max_steps} reasoning steps, or auto.", "reasoning_steps")
        if query.neighbours_weight and bundle.neighbours is None:
            raise RequestError("This model has no neighbours; leave neighbours_weight out.", "neighbours_weight")
        most = bundle.max_steps if query.steps == "auto" else bundle.default_steps
        return Demand(
            steps=query.steps if isinstance(query.steps, int) else most,
            beam_width=width,
            deadline=now + (limits.default_timeout if query.timeout is None else query.timeout),
            flexible=query.steps == "auto" or (query.steps is None and query.timeout is not None),
            min_beam_width=width if query.rank_only else min(query.length, width),
            variant=(query.paths, query.explain, query.rank_only),
            model=bundle.version,
            client=query.client,
            searches=searches_of(query.explore),
        )

    async def _known_history(self, user_id: str | None) -> Sequence[str | Event]:
        if user_id is None:
            return ()
        try:
            return await self._users.get(user_id)
        except StoreUnavailable:
            self._observer.fell_back("store_unavailable")
            return ()

    async def _rotated(self, query: Query) -> Collection[str]:
        """Items that go down for the user. Raises RequestError where it is not kept what users are shown."""
        if self._impressions is None:
            raise RequestError(
                "This service does not keep what users are shown; set STREAMREC_ROTATION_WINDOW_S, and "
                "STREAMREC_REDIS_URL for several processes.",
                "rotation",
            )
        if query.user_id is None:
            return ()
        try:
            return set(await self._impressions.get(receipts.user_key(query.user_id, self._user_secret)))
        except StoreUnavailable:
            self._observer.fell_back("store_unavailable")
            return ()

    async def _look_up(self, user_id: str | None, history: tuple[int, ...], erasures: int) -> Lookup:
        if user_id is None:
            return Lookup("off")
        user, items = digest(user_id, self._user_secret), len(history)
        return await self._cache.get(
            user, self._state_version, history, erasures, lambda state: self.bundle.fits(state, items)
        )

    def _checked(self, answer: Answer, rules: Rules, started: float) -> Answer:
        checked = without_invalid(self.bundle, answer, rules)
        if len(checked.items) == len(answer.items):
            return checked
        # What an operator has changed meanwhile is nobody's fault.
        changed = [self.bundle.catalogue.has_changed(row, started) for row in set(answer.items) - set(checked.items)]
        if missing := len(answer.items) - len(checked.items) - sum(changed):
            self._observer.dropped_invalid_items(missing)
            log.error("the search returned %d items that do not exist or are not permitted", missing)
        return checked

    async def erase(self, user_id: str) -> None:
        """Erases the user's known history, then the states made from it. Raises StoreUnavailable."""
        await self._users.delete(user_id)
        await _reached(self._cache.erase(digest(user_id, self._user_secret)))

    async def held(self, user_id: str) -> list[str]:
        """The cache tiers that hold something of the user. Raises StoreUnavailable."""
        return await _reached(self._cache.held(digest(user_id, self._user_secret)))


def resolve(bundle: Bundle, query: Query, history: Sequence[str | Event]) -> Resolved:
    """The query in catalogue rows. Ids that the catalogue does not have are ignored and listed; an event of a type that
    the bundle leaves out is as if it had not happened.

    Raises UnknownCatalogue and RequestError for a named subset or a category that does not exist, and FilterError.
    """
    catalogue = bundle.catalogue
    unknown: dict[str, None] = {}

    def rows(ids: Sequence[str]) -> tuple[int, ...]:
        found = catalogue.rows(ids)
        if None in found:
            unknown.update({item_id: None for item_id, row in zip(ids, found, strict=True) if row is None})
        return tuple(row for row in found if row is not None)

    ids, events = read_events(history, bundle.settings.type_weights)
    seen = rows(ids)
    if events is not None:
        is_known = [row is not None for row in catalogue.rows(ids)]
        events = events.of(is_known).of(slice(-bundle.max_items, None))
    rules = Rules(
        exclude=tuple(set(seen)) if query.exclude_seen else (),
        deny=rows(query.deny),
        allow=None if query.allow is None else rows(query.allow),
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


def run_batch(searches: Sequence[Search], costs: CostTable, observer: Observer) -> list[Answer]:
    """On the engine's thread: answers to searches of one plan. What they cost is recorded."""
    answers, seconds = encode_and_search(searches)
    first, rows = searches[0], sum(search.request.beam_rows for search in searches)
    if first.request.paths is None and first.request.items is None:  # the table is of searches, by the bundle's paths
        costs.observe(first.request.reasoning_steps, rows, seconds, first.engine.bundle.version)
    observer.batch_ran(len(searches), rows, answers[0].seconds)
    return answers


def encode_and_search(searches: Sequence[Search]) -> tuple[list[Answer], float]:
    """Answers to searches of one engine and one plan, and the seconds they took together. States are left in the
    flights."""
    started, engine = time.perf_counter(), searches[0].engine
    missing = {id(search.flight): search for search in searches if search.flight.state is None}.values()
    encoded = engine.encode([search.request.history for search in missing]) if missing else []
    for search, state in zip(missing, encoded, strict=True):
        search.flight.state = state
    encode = time.perf_counter() - started if missing else 0.0
    states = [search.flight.state for search in searches if search.flight.state is not None]
    answers = engine.search([search.request for search in searches], states)
    for answer in answers:
        answer.seconds = {"encode": encode} | answer.seconds
    return answers, time.perf_counter() - started


def without_invalid(bundle: Bundle, answer: Answer, rules: Rules) -> Answer:
    """The answer without items that must not be in it. There are none; this is the last look before a client's."""
    keep = bundle.catalogue.permitted_indices(answer.items, rules)
    if len(keep) == len(answer.items):
        return answer
    return answer.select(keep)


def to_list(
    bundle: Bundle, query: Query, answer: Answer, rotated: Collection[str] = (), *, are_logs: bool = True
) -> Answer:
    """The list that a query asks for, of what was found for it. rotated: the items that go down. are_logs: what scores
    are."""
    scores = answer.scores
    if rotated:
        scores = lowered(_ids(bundle, answer), scores, rotated, query.rotation, are_logs=are_logs)
    if query.diversity or query.max_per_category is not None or query.explore or query.rotation:
        chosen = choose(
            bundle, answer.items, scores, query.length, query.diversity, query.max_per_category, query.explore
        )
        answer = answer.select(chosen)
    if query.shown:
        answer = answer.select(receipts.unshown(_ids(bundle, answer), query.shown)[: query.k])
    return answer


def _ids(bundle: Bundle, answer: Answer) -> list[str]:
    return [bundle.catalogue.item_ids[row] for row in answer.items]


def popular(
    bundle: Bundle,
    query: Query,
    resolved: Resolved,
    beam_width: int,
    started: float,
    ranked: Ranked | None = None,
    rotated: Collection[str] = (),
) -> Recommendation:
    """For those of whom nothing is known: those of the ranked items that the rules permit, then the most popular.
    rotated: items that go down."""
    catalogue, k = bundle.catalogue, query.found(beam_width)
    if ranked is None:
        items = catalogue.popular(k, resolved.rules, resolved.boosts)
        worth = catalogue.popularity[items] * np.exp(catalogue.log_factors(resolved.boosts, items))
        ranked = Ranked(items, worth.tolist())
    else:
        if resolved.boosts:
            ranked = boosted(catalogue, ranked, resolved.boosts)
        ranked = filled(catalogue, ranked, resolved.rules, k)
    answer = to_list(bundle, query, Answer(*ranked), rotated, are_logs=False)
    plan, seconds = Plan(0, beam_width), {"total": time.monotonic() - started}
    return Recommendation(answer.items, answer.scores, "popularity", plan, resolved.unknown_items, seconds=seconds)


def recommend_batch(engine: EngineLike, queries: Sequence[Query], plan: Plan) -> list[Recommendation]:
    """An answer per query, all under one plan and in one search, without cache and queue: for offline scoring."""
    started, bundle = time.monotonic(), engine.bundle
    resolved = [resolve(bundle, query, query.history) for query in queries]
    known = [i for i, each in enumerate(resolved) if each.history]
    searches = [Search(engine, to_request(queries[i], resolved[i], plan)) for i in known]
    answers = dict(zip(known, encode_and_search(searches)[0] if searches else [], strict=True))

    def finished(i: int) -> Recommendation:
        if i not in answers:
            return popular(bundle, queries[i], resolved[i], plan.beam_width, started)
        answer = to_list(bundle, queries[i], without_invalid(bundle, answers[i], resolved[i].rules))
        seconds = answer.seconds | {"total": time.monotonic() - started}
        return Recommendation(
            answer.items, answer.scores, "model", plan, resolved[i].unknown_items, seconds=seconds, trace=answer.trace
        )

    return [finished(i) for i in range(len(queries))]


async def _reached(work: Awaitable[T]) -> T:
    try:
        return await work
    except (RedisDown, RedisError) as error:
        raise StoreUnavailable("The cache did not answer; try again shortly.") from error
