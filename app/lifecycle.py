"""The service's life: loading, warming, ready, draining, dead; and the parts of serving joined by its settings."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from redis.exceptions import RedisError

from app import errors, logs, scenarios
from app.loading import calibration, folder_of, open_engine
from app.metrics import Metrics
from app.settings import Settings
from app.stores import open_stores
from serving.bundle import Bundle
from serving.errors import BundleError, Conflict, EngineError, RequestError, ServingError, StoreError, StoreUnavailable
from serving.items.filter_parser import parse_filter
from serving.manifest import read_manifest
from serving.online import trends
from serving.online.admission import Admission, State
from serving.online.batcher import Batcher, EngineHung, Ticket
from serving.online.catalogues import KIND, Catalogues
from serving.online.changelog import Entry
from serving.online.changes import Changes
from serving.online.costs import CostTable
from serving.online.feedback import IMPRESSION, POSITIVE
from serving.online.live_catalogue import LiveCatalogue
from serving.online.models import Change, Models
from serving.online.observer import Observer
from serving.online.receipts import user_key
from serving.online.recommender import Limits, Recommender
from serving.online.redis_link import RedisDown, RedisLink, fault_of, trouble_of
from serving.online.searching import EngineLike, Search, encode_and_search, run_batch
from serving.online.watchdog import LOOK_EVERY, Watchdog
from serving.sample import check_sample
from serving.types import Answer, Request, Rules

log = logging.getLogger("streamrec.service")

ASK_REDIS_EVERY = 5.0  # seconds
MAX_SUBSETS = 1000  # named, before a further one is refused
YOUNG_OBJECTS = 10_000  # before Python looks for garbage among them; its 700 are what few requests at a time make


class Applied(NamedTuple):
    """What a change of the catalogue has come to: see `LiveCatalogue.apply`. row: of `items`, those of the model that
    was active."""

    items: LiveCatalogue
    row: int


class Service:
    """Joins bundle, engine, admission, batcher, cache and users to a recommender.

    The model is loaded and warmed on the engine's own thread, so that the probes answer meanwhile. With `engine`
    nothing is loaded. `on_failure` is called with what kept the service from starting, on that thread or the event
    loop's; `on_death`, then and later, with whatever stopped the engine.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineLike | None = None,
        on_ready: Callable[[Service], None] = lambda service: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.settings, self.metrics, self.costs = settings, Metrics(), CostTable()
        self.metrics.begin_at_zero(errors.REASONS)
        logs.count_dropped(self.metrics.dropped_log_lines.inc)
        self._engine, self._on_ready, self._on_failure, self._on_death = engine, on_ready, on_failure, on_death
        self._start_failure: BaseException | None = None
        self._watching: list[asyncio.Task[None]] = []
        self.redis_trouble: str | None = (
            None  # why Redis is not used, where it should be; requests are answered without
        )
        self._models: Models | None = None
        self._adding = asyncio.Lock()  # models are loaded one by one: each takes memory and cores
        self._drain_until: float | None = None
        self.admission: Admission[Ticket[Search, Answer]] = Admission(
            self.costs,
            max_batch=settings.max_batch,
            max_rows=settings.max_batch_rows,
            max_wait=settings.max_queue_ms / 1000,
            state="loading",
        )
        self.batcher: Batcher[Search, Answer] = Batcher(
            self.admission,
            lambda searches: run_batch(searches, self.costs, self.metrics),
            prepare=self._prepare,
            check=self._check_engine,
            on_depth=self.metrics.queue_depth.set,
            on_death=self._died,
        )
        stores = open_stores(settings, lambda tier, result: self.metrics.cache.labels(tier, result).inc())
        self._redis = stores.redis
        self._redis_fault: str | None = None
        self.users, self.cache, self.feedback = stores.users, stores.cache, stores.feedback
        self.impressions, self.counters = stores.impressions, stores.counters
        self.catalogues = Catalogues(stores.change_log, self.batcher.between_batches)
        self.scenarios = scenarios.Scenarios()
        self.changes = Changes(
            stores.change_log,
            {"model": self._apply_to_models, KIND: self._apply_to_catalogues, scenarios.KIND: self.scenarios.apply},
        )

    @property
    def models(self) -> Models:
        """Raises NotReady before the bundle is loaded."""
        if self._models is None:
            self.admission.check_open()
        assert self._models is not None
        return self._models

    @property
    def recommender(self) -> Recommender:
        """Of the active model. Raises NotReady before the bundle is loaded."""
        return self.models.active

    @property
    def bundle(self) -> Bundle:
        """The active one. Raises NotReady before it is loaded."""
        return self.recommender.bundle

    @property
    def status(self) -> State:
        return self.admission.state

    async def start(self) -> None:
        if self._redis is not None:
            # Opens a connection ahead of the first request, which has only milliseconds for it.
            with suppress(RedisDown, RedisError):
                self._redis_fault = await RedisLink(self._redis, 1.0).call(fault_of)
        await self.cache.start()
        self._loop = asyncio.get_running_loop()
        self.batcher.start()
        self._watching.append(asyncio.create_task(self._watch()))
        if self._redis is not None:
            self._watching.append(asyncio.create_task(self._watch_redis(RedisLink(self._redis, 1.0))))

    async def _follow_changes(self) -> None:
        """Replays the log of changes, is ready then, and follows the log."""
        if self.status == "engine dead":
            return  # its start came to an end after all, too late
        await self.catalogues.add(self.recommender.engine)
        try:
            await self.changes.replay()
        except StoreError as error:
            self._fail_to_start(error)
            return
        self.admission.advance("ready")
        log.info("ready", extra={"version": self.bundle.version, "items": len(self.bundle.catalogue)})
        self._on_ready(self)
        await self.changes.follow()

    async def _watch_redis(self, link: RedisLink) -> None:
        while True:
            trouble = await trouble_of(link)
            if trouble is not None and trouble != self.redis_trouble:
                log.warning("%s", trouble)
            self.redis_trouble = trouble
            await asyncio.sleep(ASK_REDIS_EVERY)

    async def _watch(self) -> None:
        starting, running = Watchdog(self.settings.start_timeout_s), Watchdog(self.settings.hung_after_s)
        while self.batcher.death is None:
            self.batcher.watch(starting if self.status in ("loading", "warming") else running)
            await asyncio.sleep(LOOK_EVERY)

    def _check_engine(self) -> None:
        """On the engine's thread: a search known to work, by the defaults. Raises what the engine raises."""
        bundle = self.bundle
        history = tuple(bundle.catalogue.popular(bundle.max_items, Rules()))
        request = Request(history, 1, self.settings.default_beam_width, bundle.default_steps)
        encode_and_search([Search(self.recommender.engine, request)])

    def _died(self, error: BaseException) -> None:
        if error is not self._start_failure:
            stack = {"stack": error.stack} if isinstance(error, EngineHung) else {}
            log.error("the engine is dead, restart the service: %s", error, exc_info=error, extra=stack)
        self._on_death(error)

    def _prepare(self) -> None:
        """On the engine's thread: load, warm up, measure. Then changes are replayed, before anything is answered."""
        try:
            if self._redis_fault is not None:
                raise StoreError(self._redis_fault)
            engine = self._engine or open_engine(self.settings, self.settings.bundle)
            self._models = Models(self._recommender(engine), self._open_beside, self.settings.user_secret, self.metrics)
            self.admission.advance("warming")
            engine.warm_up()
            for searches in calibration(self.settings, engine):
                self._measure(searches)
            engine.bundle.catalogue.index_titles()
            self.metrics.show_models(engine.bundle.version)
            _freeze_heap()
            gc.set_threshold(YOUNG_OBJECTS)
        except BaseException as error:
            self._fail_to_start(error)
            raise
        self.admission.advance("replaying")
        self._loop.call_soon_threadsafe(lambda: self._watching.append(self._loop.create_task(self._follow_changes())))

    def _fail_to_start(self, error: BaseException) -> None:
        log.error("the engine could not start: %s", error)
        self._start_failure = error
        self._on_failure(error)

    def _recommender(self, engine: EngineLike) -> Recommender:
        settings = self.settings
        limits = Limits(settings.max_beam_width, settings.default_beam_width, settings.default_timeout_ms / 1000)
        cold_lists = {"popular": trends.popular, "trending": trends.trending}
        cold_list = None if settings.cold_list == "bundle" else partial(cold_lists[settings.cold_list], self.counters)
        return Recommender(
            engine, self.batcher, self.cache, self.users, limits, settings.user_secret, self.metrics,
            settings.runtime, cold_list, self.impressions,
        )  # fmt: skip

    def _measure(self, searches: list[Search]) -> None:
        """On the engine's thread: what a batch costs. It counts as nobody's request."""
        run_batch(searches, self.costs, Observer())

    async def add_model(self, path: str) -> Recommender:
        """Loads the bundle in a folder below `models_dir`, here and in every other process. Nobody is answered by it
        before it is activated or given traffic. Raises RequestError, Conflict and BundleError."""
        folder = folder_of(self.settings, path)
        async with self._adding:
            _, version = await asyncio.to_thread(read_manifest, folder)
            if version not in self.models.loaded:
                others = set(self.models.deployment.versions) - {version}
                if len(others) >= self.settings.max_models:
                    raise Conflict(
                        f"{self.settings.max_models} models are loaded, the most permitted; retire one first."
                    )
                try:
                    await self.change_models(await self.models.stage(version, path))
                finally:
                    self.models.unstage(version)
                    if version not in self.models.in_memory:
                        await self.catalogues.forget(version)
            return self.models.loaded[version]

    async def change_models(self, change: Change) -> None:
        """Makes a change of models, here and in every process that follows the same log. Raises StoreUnavailable, and
        UnknownModel or Conflict where another change came first."""
        [result] = await self.changes.make("model", [change])
        if isinstance(result, Exception):
            raise result

    async def _apply_to_models(self, changes: Sequence[Change]) -> Sequence[ServingError | None]:
        models = self.models
        before = set(models.loaded)
        results = await models.apply(changes)
        for retired in before.difference(models.loaded):
            self.costs.forget(retired)
        await self.catalogues.keep(models.in_memory)
        self.metrics.show_models(models.active.bundle.version, before.union(models.loaded))
        return results

    async def _open_beside(self, path: str) -> Recommender:
        """A model from its folder, ready to answer, while others answer. Raises BundleError."""
        # What captures or uses a GPU belongs to the engine's thread; a CPU has cores and time slices for both.
        run = self.batcher.between_batches if self.settings.runtime == "cuda" else asyncio.to_thread
        try:
            engine = await asyncio.to_thread(open_engine, self.settings, folder_of(self.settings, path))
            await run(engine.warm_up)
            await run(partial(check_sample, engine))
        except EngineError as error:
            raise BundleError(f"The bundle in {path} cannot be served: {error}") from error
        for searches in calibration(self.settings, engine):
            await self.batcher.between_batches(partial(self._measure, searches))
        await asyncio.to_thread(engine.bundle.catalogue.index_titles)
        await self.catalogues.add(engine)
        _freeze_heap()
        return self._recommender(engine)

    async def erase_user(self, user_id: str) -> None:
        """Erases all that is kept about a user. Raises StoreUnavailable: something may be left then."""
        await self.recommender.erase(user_id)
        user = user_key(user_id, self.settings.user_secret)
        await self.feedback.erase(user)
        if self.impressions is not None:
            await self.impressions.erase(user)

    async def feedback_kept(self, user_id: str) -> int:
        """How many records of a user's feedback are kept. Raises StoreUnavailable."""
        return await self.feedback.count(user_key(user_id, self.settings.user_secret))

    async def shown(self, user_id: str) -> list[str]:
        """What is kept of the items a user was shown. Raises StoreUnavailable."""
        user = user_key(user_id, self.settings.user_secret)
        return [] if self.impressions is None else await self.impressions.get(user)

    async def record_feedback(self, user: str, item_id: str, event: str) -> None:
        """What somebody did with a recommended item, for counts and rotation. user: the key; empty: nobody. What cannot
        be kept of it is lost."""
        if event in POSITIVE:
            self.count([item_id])
        if self.impressions is None or not user:
            return
        with suppress(StoreUnavailable):
            if event == IMPRESSION:
                await self.impressions.show(user, item_id)
            elif event in POSITIVE:
                await self.impressions.take(user, item_id)

    def count(self, item_ids: Iterable[str]) -> None:
        """Counts an event on each of these items that the catalogue has."""
        row = self.bundle.catalogue.row
        self.counters.add(item_id for item_id in item_ids if row(item_id) is not None)

    # Changes of the catalogue

    @property
    def items(self) -> LiveCatalogue:
        """Those of the active model. Raises NotReady before it is ready."""
        self.check_ready()
        return self.catalogues.of(self.bundle.version)

    async def put_items(self, items: Sequence[Entry]) -> list[Applied | Exception]:
        """Puts items, see `LiveCatalogue.put_entries`: where each is, or why it could not be put.

        Raises StoreUnavailable, and then nothing is known to be done."""
        made = await self.items.put_entries(items)
        entries = [entry for entry in made if not isinstance(entry, Exception)]
        applied = iter(await self.changes.make(KIND, entries) if entries else ())
        return [each if isinstance(each, Exception) else next(applied) for each in made]

    async def delete_items(self, item_ids: Sequence[str]) -> None:
        """Takes items out of every answer. Raises StoreUnavailable."""
        for result in await self.changes.make(KIND, [{"do": "delete", "item_id": item_id} for item_id in item_ids]):
            if isinstance(result, Exception):
                raise result

    async def name_catalogue(self, name: str, subset: Entry) -> None:
        """Names a subset: `items`, or the `filter` that they pass.

        Raises StoreUnavailable and RequestError."""
        names = self.bundle.catalogue.subset_names
        if name not in names and len(names) >= MAX_SUBSETS:
            raise RequestError(
                f"There are {len(names)} named catalogues, the most permitted; replace one of them.", "name"
            )
        if "filter" in subset:
            subset = {"filter": parse_filter(subset["filter"]).text}
        [result] = await self.changes.make(KIND, [{"do": "name", "name": name, **subset}])
        if isinstance(result, Exception):
            raise result

    async def _apply_to_catalogues(self, entries: Sequence[Entry]) -> Sequence[Applied | Exception]:
        """With its catalogue, for another model may be active once whoever made a change sees the result."""
        results = (await self.catalogues.apply(entries))[self.bundle.version]
        items = self.catalogues.of(self.bundle.version)
        return [each if isinstance(each, Exception) else Applied(items, each) for each in results]

    def check_ready(self) -> None:
        """Raises what keeps the service from answering."""
        self.admission.check_open()

    def begin_drain(self) -> None:
        """From now on not ready; what is queued and running is finished, before the one deadline set here."""
        self.admission.advance("draining")
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self.settings.drain_timeout_s

    @property
    def drain_time_left(self) -> float:
        """Seconds until what still runs is given up."""
        assert self._drain_until is not None, "the drain has not begun"
        return max(0.0, self._drain_until - time.monotonic())

    async def drain(self) -> None:
        """Finishes what is in flight, until the deadline."""
        self.begin_drain()
        try:
            async with asyncio.timeout(self.drain_time_left):
                await self.batcher.drain()
        except TimeoutError:
            log.warning("gave up on running requests after %s s", self.settings.drain_timeout_s)

    async def close(self) -> None:
        await self.drain()
        for watching in self._watching:
            watching.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)  # their connections are free before they close
        if self._models is not None:
            await self._models.close()
        await self.catalogues.keep(())
        await self.cache.close()
        await self.counters.close()
        if self._redis is not None:
            await self._redis.aclose()


def _freeze_heap() -> None:
    """Spares all that lives now from further searches for garbage, so that no long one stalls the answers."""
    gc.collect()  # what is garbage already would stay as well
    gc.freeze()
