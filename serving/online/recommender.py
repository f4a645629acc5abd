"""The way of a request: item ids to catalogue rows, cache, queue, search, and a checked answer. No HTTP in it.

    query -> resolve -> (nothing known: popularity) -> encoder state from the cache -> plan and queue -> search -> check

Offline scoring resolves, searches and checks with the same functions (`recommend_batch`), without cache and queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redis.exceptions import RedisError

from serving.errors import RequestError, StoreUnavailable
from serving.items.catalogue import Catalogue
from serving.online import receipts
from serving.online.admission import Demand, Plan
from serving.online.batcher import Batcher
from serving.online.cache import Lookup, StateCache
from serving.online.impressions import Impressions
from serving.online.listing import Recommendation, popular, to_list, without_invalid
from serving.online.observer import Observer
from serving.online.popular_items import PopularItems
from serving.online.query import Query, Resolved, resolve, to_request
from serving.online.redis_link import RedisDown
from serving.online.scans import CatalogueScans
from serving.online.searching import EngineLike, Search, encode_and_search
from serving.online.similar import SimilarItems
from serving.online.trends import Ranked, boosted, filled, of_bundle
from serving.online.users import UserStore, digest
from serving.search.scoring import AT_ONCE
from serving.types import Answer, Event, Rules, searches_of

log = logging.getLogger("streamrec.recommender")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """The service's bounds and defaults. Seconds."""

    max_beam_width: int
    default_beam_width: int
    default_timeout: float


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
        self.scans = CatalogueScans()
        self.similar = SimilarItems(self.bundle, self.scans)
        self.popular = PopularItems(self.bundle.catalogue, self.scans)
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
            ranked = await self._most_popular(resolved, query.found(demand.beam_width))
            return self._observed(popular(self.bundle, query, resolved, demand.beam_width, started, ranked, rotated))
        lookup, seconds = Lookup("off"), dict[str, float]()
        if query.user_id is not None:
            asked = time.monotonic()
            lookup = await self._look_up(query.user_id, resolved.history, erasures)
            seconds["cache"] = time.monotonic() - asked

        def search(plan: Plan) -> Search:
            return Search(self.engine, to_request(query, resolved, plan), lookup.flight)

        outcome = await self._batcher.submit(demand, search)
        self._cache.put(lookup)
        seconds["queue"] = outcome.waited
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

    async def _most_popular(self, resolved: Resolved, k: int) -> Ranked:
        """The k most popular items that the rules permit, by the cold list and then in the bundle."""
        catalogue, rules, boosts = self.bundle.catalogue, resolved.rules, resolved.boosts
        if self._cold_list is None:
            return of_bundle(catalogue, await self.popular.find(k, rules, boosts), boosts)
        ranked = await self._cold_list(catalogue)
        return await filled(self.popular, boosted(catalogue, ranked, boosts) if boosts else ranked, rules, k)

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

    def check(self, query: Query) -> None:
        """Raises RequestError for a query beyond what this service and its model take."""
        bundle, limits = self.bundle, self._limits
        width = self.beam_width(query)
        if width > limits.max_beam_width and not query.rank_only:
            field = "k" if query.k > limits.max_beam_width else "beam_width"
            raise RequestError(f"This service allows at most {limits.max_beam_width}; ask for less.", field)
        if isinstance(query.steps, int) and not 0 <= query.steps <= bundle.max_steps:
            raise RequestError(f"This model takes 0 to {bundle.max_steps} reasoning steps, or auto.", "reasoning_steps")
        if query.neighbours_weight and bundle.neighbours is None:
            raise RequestError("This model has no neighbours; leave neighbours_weight out.", "neighbours_weight")

    def _demand(self, query: Query, now: float) -> Demand:
        """A requested number of steps is kept. `auto` takes as many as fit the time budget, of those that are worth
        their time; so does, up to the bundle's default, a query with a time budget and no steps."""
        self.check(query)
        bundle, limits, width = self.bundle, self._limits, self.beam_width(query)
        most = bundle.most_steps(query.steps)
        flexible = query.steps == "auto" or (query.steps is None and query.timeout is not None)
        return Demand(
            steps=most,
            beam_width=width,
            deadline=now + (limits.default_timeout if query.timeout is None else query.timeout),
            flexible=flexible,
            fewer=[steps for steps in reversed(bundle.worthwhile_steps) if steps < most] if flexible else (),
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

    async def _look_up(self, user_id: str, history: tuple[int, ...], erasures: int) -> Lookup:
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


def recommend_batch(engine: EngineLike, queries: Sequence[Query], plan: Plan) -> list[Recommendation]:
    """An answer per query, all under one plan and in one search, without cache and queue: for offline scoring."""
    started, bundle = time.monotonic(), engine.bundle
    resolved = [resolve(bundle, query, query.history) for query in queries]
    known = [i for i, each in enumerate(resolved) if each.history]
    searches = [Search(engine, to_request(queries[i], resolved[i], plan)) for i in known]
    answers = dict(zip(known, encode_and_search(searches)[0] if searches else [], strict=True))

    def finished(i: int) -> Recommendation:
        if i not in answers:
            rules, boosts = resolved[i].rules, resolved[i].boosts
            rows = bundle.catalogue.popular(queries[i].found(plan.beam_width), rules, boosts)
            ranked = of_bundle(bundle.catalogue, rows, boosts)
            return popular(bundle, queries[i], resolved[i], plan.beam_width, started, ranked)
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
