"""The service behind the routes: its life (loading to draining), and the way of a request through cache and engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

from redis.exceptions import RedisError

from app.answers import explained, named
from app.errors import NotReady
from app.ids import fresh_id
from app.metrics import Metrics
from app.schemas import RecommendRequest, RecommendResponse, Timings
from app.settings import Settings
from serving.bundle import Bundle
from serving.engine import Engine
from serving.errors import DeadlineExceeded, Draining, EngineDead, Overloaded, RequestError, UnknownCatalogue
from serving.online.batcher import Batcher, Job
from serving.online.cache import Flight, Lookup, StateCache
from serving.online.planner import LIKELY, TYPICAL, Planner
from serving.online.redis_link import RedisDown, RedisLink, connect
from serving.online.tiers import MemoryTier, RedisTier
from serving.online.users import MemoryUsers, NoUsers, RedisUsers, StoreUnavailable, UserStore, digest
from serving.types import Answer, EncoderState, Request, Rules

log = logging.getLogger("streamrec.service")

Status = Literal["loading", "warming", "ready", "draining", "engine dead"]
Steps = int | Literal["auto"] | None
PRIMING_RUNS = 2
CARE = 1.25  # times the wait that is reckoned: who is let in and comes too late was computed for nothing


class EngineLike(Protocol):
    """What the service needs of an engine; `serving.engine.Engine` is the one there is."""

    bundle: Bundle

    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]: ...

    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]: ...

    def warm_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Search:
    """One request for the engine thread, and the encoder state it shares with others of the same user and history."""

    request: Request
    flight: Flight


class Service:
    """Joins bundle, engine, batcher, planner, cache and users.

    The model is loaded and warmed on the engine's own thread, so that the probes answer meanwhile. With `engine`
    nothing is loaded. Called on that thread: `on_failure` with what kept the engine from starting, then and later
    `on_death` with whatever stopped it.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineLike | None = None,
        on_ready: Callable[[Service], None] = lambda service: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.settings, self.metrics = settings, Metrics()
        self._engine, self._on_ready, self._on_failure = engine, on_ready, on_failure
        self._status: Status = "loading"
        self.planner = planner = Planner()
        self.batcher: Batcher[Search, Answer] = Batcher(
            self._run,
            lambda key, rows: planner.estimate(key[0], rows, TYPICAL),
            max_batch=settings.max_batch,
            max_rows=settings.max_batch_rows,
            max_wait=settings.max_queue_ms / 1000,
            prepare=self._prepare,
            on_depth=self.metrics.queue_depth.set,
            on_death=on_death,
        )
        self._categories: set[str] = set()
        self._connect()

    def _connect(self) -> None:
        settings = self.settings
        memory = redis = None
        self._redis = None
        self.users: UserStore = MemoryUsers(settings.max_known_users, settings.max_known_items)
        if settings.memory_cache_users:
            memory = MemoryTier(settings.memory_cache_users, settings.memory_cache_bytes, settings.cache_ttl_s)
        if settings.workers > 1 and settings.redis_url is None:
            # What one process knew of a user, the others would neither use nor erase.
            log.warning("several workers keep nothing of users without Redis; set STREAMREC_REDIS_URL")
            self.users, memory = NoUsers(), None
        if settings.redis_url is not None:
            self._redis = connect(settings.redis_url.get_secret_value())
            link = RedisLink(self._redis, settings.redis_timeout_ms / 1000)
            store = RedisLink(self._redis, settings.redis_store_timeout_ms / 1000)
            redis = RedisTier(link, store, settings.cache_ttl_s, settings.redis_max_value_bytes, settings.state_dtype)
            self.users = RedisUsers(store, settings.max_known_items, settings.user_secret)
        self.cache = StateCache(memory, redis, lambda tier, result: self.metrics.cache.labels(tier, result).inc())

    # Life

    async def start(self) -> None:
        if self._redis is not None:
            # Opens a connection ahead of the first request, which has only milliseconds for it.
            await asyncio.gather(RedisLink(self._redis, 1.0).call(lambda client: client.ping()), return_exceptions=True)
        await self.cache.start()
        self.batcher.start()

    def _prepare(self) -> None:
        """On the engine thread: load, warm, measure. Nothing is answered before its end."""
        try:
            if self._engine is None:
                bundle = Bundle.load(self.settings.bundle)
                self._engine = Engine(
                    bundle,
                    runtime=self.settings.runtime,
                    threads=self.settings.threads,
                    state_dtype=self.settings.state_dtype,
                )
            bundle = self.bundle
            self._status = "warming" if self._status == "loading" else self._status
            self._engine.warm_up()
            self._prime()
            self._categories = bundle.catalogue.category_names
            bundle.catalogue.index_titles()
            self.metrics.model_info.labels(bundle.version).set(1)
            gc.collect()
            gc.freeze()  # what lives as long as the process need not be searched again: no long collection stalls
        except BaseException as error:
            log.error("the engine could not start: %s", error)
            self._on_failure(error)
            raise
        if self._status == "warming":
            self._status = "ready"
        log.info("ready", extra={"version": self.bundle.version, "items": len(bundle.catalogue)})
        self._on_ready(self)

    def _prime(self) -> None:
        """Measures every number of steps, narrow beams and full batches, so that the first time budget meets figures
        and not guesses, and the first real request no shape that was never run."""
        settings = self.settings
        history = tuple(self.bundle.catalogue.popular(self.bundle.max_items, Rules()))
        beam, k = settings.default_beam_width, min(10, settings.default_beam_width)
        shapes = [(width, 1) for width in _narrower(beam, k)]
        most = max(1, min(settings.max_batch, settings.max_batch_rows // beam))
        shapes += [(beam, 2**power) for power in range(1, most.bit_length())]
        for steps, (width, count) in product(range(self.bundle.max_steps + 1), shapes):
            request = Request(history, k, width, steps, Rules(exclude=history))
            for _ in range(PRIMING_RUNS):
                self._run([Search(request, Flight()) for _ in range(count)], record=False)

    @property
    def bundle(self) -> Bundle:
        assert self._engine is not None, "asked for the bundle before it was loaded"
        return self._engine.bundle

    @property
    def status(self) -> Status:
        return "engine dead" if self.batcher.death is not None else self._status

    def begin_drain(self) -> None:
        """From now on not ready; what is queued and running is finished."""
        self._status = "draining"

    async def drain(self) -> None:
        """Finish what is in flight, for at most the configured time."""
        self.begin_drain()
        try:
            await asyncio.wait_for(self.batcher.drain(), self.settings.drain_timeout_s)
        except TimeoutError:
            log.warning("gave up waiting for running requests after %s s", self.settings.drain_timeout_s)

    async def close(self) -> None:
        await self.drain()
        await self.cache.close()
        if self._redis is not None:
            await self._redis.aclose()

    def check_ready(self) -> None:
        """Raises what keeps the service from answering."""
        match self.status:
            case "loading" | "warming" as status:
                raise NotReady(f"The model is {status}; try again shortly.")
            case "draining":
                raise Draining("The service is shutting down; send the request to another replica.")
            case "engine dead":
                raise EngineDead("The engine has stopped; restart the service.")

    def check_room(self) -> None:
        """Raises what keeps the service from taking any request at all."""
        self.check_ready()
        self.batcher.check_room()

    def full_for(self) -> float | None:
        """While requests find the queue full: seconds after which to come again. Draining or dead it says nothing."""
        return self.batcher.full_for() if self.status == "ready" else None

    # The engine's thread

    def _run(self, searches: Sequence[Search], record: bool = True) -> list[Answer]:
        """Encode what was not cached, then search. All requests share what `_key` names."""
        engine = self._engine
        assert engine is not None
        started = time.perf_counter()
        missing = {id(search.flight): search for search in searches if search.flight.state is None}.values()
        encoded = engine.encode([search.request.history for search in missing]) if missing else []
        for search, state in zip(missing, encoded, strict=True):
            search.flight.state = state
        encode = time.perf_counter() - started
        states = [search.flight.state for search in searches if search.flight.state is not None]
        answers = engine.search([search.request for search in searches], states)
        seconds = time.perf_counter() - started
        for answer in answers:
            answer.seconds = {"encode": encode if missing else 0.0} | answer.seconds
        rows = sum(search.request.beam_width for search in searches)
        if searches[0].request.paths is None:  # the costs are those of the bundle's own number of paths
            self.planner.observe(searches[0].request.reasoning_steps, rows, seconds)
        if record:
            self._record(searches, answers[0])
        return answers

    def _record(self, searches: Sequence[Search], answer: Answer) -> None:
        self.metrics.batch_size.observe(len(searches))
        self.metrics.beam_rows.observe(sum(search.request.beam_width for search in searches))
        for stage in ("encode", "reason", "decode"):
            self.metrics.stages[stage].observe(answer.seconds.get(stage, 0.0))

    # A request

    async def recommend(self, body: RecommendRequest, asked_steps: Steps) -> RecommendResponse:
        """Raises serving's errors; whatever happens to Redis, an answer comes."""
        started = time.monotonic()
        self.check_ready()
        bundle, settings = self.bundle, self.settings
        beam_width = self._beam_width(body)
        if isinstance(asked_steps, int) and not 0 <= asked_steps <= bundle.max_steps:
            raise RequestError(f"This model takes 0 to {bundle.max_steps} reasoning steps, or auto.", "reasoning_steps")
        if body.neighbours_weight and bundle.neighbours is None:
            raise RequestError("This model has no neighbours; leave it out.", "neighbours_weight")
        steps = asked_steps if isinstance(asked_steps, int) else 0
        if body.user_id is not None:  # a refusal must not cost a look-up first
            self.batcher.admit(_key(steps, beam_width, body), beam_width)
        erasures = self.cache.erasures
        rules, history, unknown = await self._understand(body)
        if not history:
            return self._popular(body, rules, beam_width, unknown, started)

        budget = (body.timeout_ms if body.timeout_ms is not None else settings.default_timeout_ms) / 1000
        before_cache = time.monotonic()
        lookup = await self._look_up(body.user_id, history, erasures)
        cache_seconds = time.monotonic() - before_cache
        steps, beam_width = self._plan(asked_steps, body, started + budget - time.monotonic(), beam_width)
        request = Request(
            history, body.k, beam_width, steps, rules,
            dense_weight=body.dense_weight, neighbours_weight=body.neighbours_weight, paths=body.reasoning_paths,
            explain=body.explain,
        )  # fmt: skip
        job = Job(Search(request, lookup.flight), key=_key(steps, beam_width, body), rows=beam_width)
        answer, waited = await self.batcher.submit(job, started + budget)
        self.cache.put(lookup)
        self.metrics.stages["cache"].observe(cache_seconds)
        self.metrics.stages["queue"].observe(waited)
        self.metrics.reasoning_steps.observe(steps)
        answer = self._checked(answer, rules)
        return RecommendResponse(
            recommendation_id=fresh_id(),
            user_id=body.user_id,
            model_version=bundle.version,
            source="model",
            reasoning_steps=steps,
            reasoning_paths=body.reasoning_paths or bundle.settings.paths,
            beam_width=beam_width,
            cache=lookup.source,
            items=named(bundle.catalogue, answer.items, answer.scores),
            unknown_items=unknown,
            timings_ms=_timings(started, queue=waited, cache=cache_seconds, **answer.seconds),
            explanation=explained(bundle, request, answer) if answer.trace else None,
        )

    def _beam_width(self, body: RecommendRequest) -> int:
        limit = self.settings.max_beam_width
        width = body.beam_width if body.beam_width is not None else max(body.k, self.settings.default_beam_width)
        if width > limit:
            raise RequestError(f"At most {limit} are served here.", "k" if body.k > limit else "beam_width")
        return width

    async def _understand(self, body: RecommendRequest) -> tuple[Rules, tuple[int, ...], list[str]]:
        """The request in catalogue rows: its rules, its history, and the ids that nobody knows."""
        catalogue = self.bundle.catalogue
        if body.catalogue is not None and body.catalogue not in catalogue.subsets:
            raise UnknownCatalogue("No catalogue of that name exists; GET /models lists them.", "catalogue")
        if not self._categories.issuperset(body.categories):
            raise RequestError("No item is in one of these categories; GET /models lists them.", "categories")
        unknown: dict[str, None] = {}

        def rows(ids: Sequence[str]) -> tuple[int, ...]:
            found = catalogue.rows(ids)
            if None in found:
                unknown.update({item_id: None for item_id, row in zip(ids, found, strict=True) if row is None})
            return tuple(row for row in found if row is not None)

        history = rows(body.history or await self._known_history(body.user_id))
        rules = Rules(
            exclude=tuple(set(history)) if body.exclude_seen else (),
            deny=rows(body.deny),
            allow=None if body.allow is None else rows(body.allow),
            categories=tuple(body.categories),
            catalogue=body.catalogue,
        )
        return rules, history[-self.bundle.max_items :], list(unknown)

    async def _known_history(self, user_id: str | None) -> list[str]:
        if user_id is None:
            return []
        try:
            return await self.users.get(user_id)
        except StoreUnavailable:
            self.metrics.fallback.labels("store_unavailable").inc()
            return []

    async def _look_up(self, user_id: str | None, history: tuple[int, ...], erasures: int) -> Lookup:
        if user_id is None:
            return Lookup("off")
        user = digest(user_id, self.settings.user_secret)
        return await self.cache.get(user, self.bundle.version, history, erasures)

    def _plan(self, asked: Steps, body: RecommendRequest, left: float, beam_width: int) -> tuple[int, int]:
        """Steps and beam width. A number of steps that was asked for is kept to. `auto` takes the most that is likely
        (p95) done in the `left` seconds, given the queue; so does, up to the bundle's default, a request that names a
        time budget and no steps.

        What does not fit is refused at once: DeadlineExceeded where it would not fit an idle engine either, else
        Overloaded.
        """
        bundle, planner = self.bundle, self.planner

        def ahead(steps: int, width: int) -> tuple[float, int]:
            wait, beside = self.batcher.ahead(_key(steps, width, body), width)
            return CARE * wait, beside

        if asked == "auto" or (asked is None and body.timeout_ms is not None):
            most, beams = bundle.max_steps if asked == "auto" else bundle.default_steps, _narrower(beam_width, body.k)
            if chosen := planner.choose(left, ahead, most, beams):
                return chosen
            possible = planner.choose(left, lambda steps, width: (0.0, 0), most, beams) is not None
        else:
            steps = asked if isinstance(asked, int) else bundle.default_steps
            wait, beside = ahead(steps, beam_width)
            if wait + planner.estimate(steps, beside + beam_width, LIKELY if wait else TYPICAL) <= left:
                return steps, beam_width
            possible = planner.estimate(steps, beam_width, TYPICAL) <= left
        if possible:
            wait = self.batcher.expected_wait
            raise Overloaded("The queue is too long for this time budget; try again later, or allow more time.", wait)
        raise DeadlineExceeded("Nothing of what was asked for fits this time budget; allow more time, or use auto.")

    def _popular(
        self, body: RecommendRequest, rules: Rules, beam_width: int, unknown: list[str], started: float
    ) -> RecommendResponse:
        """For those of whom nothing is known: what everybody likes, within the rules."""
        catalogue = self.bundle.catalogue
        rows = catalogue.popular(body.k, rules)
        self.metrics.fallback.labels("unknown_items" if unknown else "cold_user").inc()
        return RecommendResponse(
            recommendation_id=fresh_id(),
            user_id=body.user_id,
            model_version=self.bundle.version,
            source="popularity",
            reasoning_steps=0,
            reasoning_paths=0,
            beam_width=beam_width,
            cache="off",
            items=named(catalogue, rows, [float(catalogue.popularity[row]) for row in rows]),
            unknown_items=unknown,
            timings_ms=_timings(started),
        )

    def _checked(self, answer: Answer, rules: Rules) -> Answer:
        """The answer without items that must not be in it; there are none, and the metric that counts them says so."""
        keep = self.bundle.catalogue.permitted_indices(answer.items, rules)
        if len(keep) == len(answer.items):
            return answer
        self.metrics.invalid_items.inc(len(answer.items) - len(keep))
        log.error("the search returned %d items that do not fit", len(answer.items) - len(keep))
        return Answer([answer.items[i] for i in keep], [answer.scores[i] for i in keep], answer.seconds)

    # Users and items

    async def erase(self, user_id: str) -> None:
        """Every trace of a user: the known history, then the states made from it. Raises StoreUnavailable."""
        await self.users.delete(user_id)
        await self._reach(self.cache.erase(digest(user_id, self.settings.user_secret)))

    async def held(self, user_id: str) -> list[str]:
        """The cache tiers that hold something of a user. Raises StoreUnavailable."""
        return await self._reach(self.cache.held(digest(user_id, self.settings.user_secret)))

    @staticmethod
    async def _reach(work: Any) -> Any:
        try:
            return await work
        except (RedisDown, RedisError) as error:
            raise StoreUnavailable("The cache did not answer; try again shortly.") from error


def _narrower(beam_width: int, k: int) -> list[int]:
    """The beam widths to fall back to, widest first."""
    return sorted({beam_width, max(k, beam_width // 2), k}, reverse=True)


def _key(steps: int, beam_width: int, body: RecommendRequest) -> tuple[int, int, int | None, bool]:
    """What requests of one batch share. The planner knows costs by the steps, so they come first."""
    return steps, beam_width, body.reasoning_paths, body.explain


def _timings(started: float, **seconds: float) -> Timings:
    seconds["total"] = time.monotonic() - started
    return Timings(**{stage: round(1000 * value, 3) for stage, value in seconds.items()})
