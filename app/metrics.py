"""Every metric: name, unit, labels and buckets, once. No user or item id is ever a label."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable
from functools import cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample

from app.slot import METRICS_FOLDER
from serving.online.cache import ACCESSES
from serving.online.feedback import Added
from serving.online.observer import FALLBACKS, Fallback, Observer

SECONDS = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
SCRAPE_SHARE = 0.2
STAGES = ("queue", "cache", "encode", "reason", "decode", "serialise")

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the time series


class Metrics(Observer):
    """One set per service, in its own registry. Several workers keep theirs in files, so each can report the sum."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.shared = METRICS_FOLDER in os.environ
        if not self.shared:
            ProcessCollector(registry=registry)
        self.request_seconds = Histogram(
            "streamrec_request_seconds",
            "Time to answer, by route template",
            ["route", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "streamrec_stage_seconds", "Time in a stage of /recommend", ["stage"], buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "streamrec_batch_size", "Searches that shared a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.beam_rows = Histogram(
            "streamrec_beam_rows",
            "Beam rows of a batch",
            buckets=(10, 25, 50, 100, 200, 400, 800, 1600, 3200),
            registry=registry,
        )
        self.reasoning_steps = Histogram(
            "streamrec_reasoning_steps", "Reasoning steps of an answer", buckets=tuple(range(9)), registry=registry
        )
        self.cache = Counter(
            "streamrec_cache", "Accesses to cached encoder states", ["tier", "result"], registry=registry
        )
        self.rejected = Counter("streamrec_rejected", "Requests refused", ["reason"], registry=registry)
        self.fallback = Counter("streamrec_fallback", "Answers not from the model", ["reason"], registry=registry)
        self.queue_depth = Gauge(
            "streamrec_queue_depth", "Searches in the queue", registry=registry, multiprocess_mode="livesum"
        )
        self.model_info = Gauge(
            "streamrec_model_info", "1: the active model; 0: one that is loaded, or was", ["version"],
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.recommendations = Counter(
            "streamrec_recommendations", "Answers by model, source and reasoning steps", ["version", "source", "steps"],
            registry=registry,
        )  # fmt: skip
        self.recommendation_seconds = Histogram(
            "streamrec_recommendation_seconds", "Time to an answer, by model", ["version"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.feedback = Counter(
            "streamrec_feedback", "Events on recommended items", ["version", "source", "steps", "event"],
            registry=registry,
        )  # fmt: skip
        self.hits = Counter(
            "streamrec_hits", "Recommendations with any event but impressions", ["version", "source", "steps"],
            registry=registry,
        )  # fmt: skip
        self.shadow_overlap = Histogram(
            "streamrec_shadow_overlap",
            "Share of an answer's items that the shadow found too",
            ["version"],
            buckets=tuple(tenths / 10 for tenths in range(11)),
            registry=registry,
        )
        self.shadow_failures = Counter(
            "streamrec_shadow_failures", "Searches of the shadow that did not happen", ["version", "reason"],
            registry=registry,
        )  # fmt: skip
        self.invalid_items = Counter(
            "streamrec_invalid_items",
            "Items found by the search that do not exist or are not permitted",
            registry=registry,
        )
        self.dropped_log_lines = Counter(
            "streamrec_log_lines_dropped",
            "Log lines lost because nobody read stderr, or its disk was full",
            registry=registry,
        )
        self.tasks = Gauge(
            "streamrec_event_loop_tasks", "Tasks of the event loop", registry=registry, multiprocess_mode="livesum"
        )
        self.threads = Gauge(
            "streamrec_threads", "Threads of the Python process", registry=registry, multiprocess_mode="livesum"
        )
        self._versions: set[str] = set()  # of all models that this process has or had
        # Every request needs these: looked up once, without the lock in labels().
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self.answers, self.rejections = cache(self.request_seconds.labels), cache(self.rejected.labels)
        self._answered_by = cache(self.recommendations.labels)
        self._seconds_by = cache(self.recommendation_seconds.labels)

    def begin_at_zero(self, reasons: Iterable[str]) -> None:
        """Shows rejections for these reasons, accesses to the cache and fallbacks before they first count: a rate sees
        nothing of a series that appears with its first event."""
        for reason in reasons:
            self.rejections(reason)
        for tier, result in ACCESSES:
            self.cache.labels(tier, result)
        for fallback in FALLBACKS:
            self.fallback.labels(fallback)

    def show_models(self, active: str, known: Iterable[str] = ()) -> None:
        self._versions |= {active, *known}
        for version in self._versions:
            self.model_info.labels(version).set(version == active)

    def took_feedback(self, version: str, source: str, steps: int, event: str, added: Added) -> None:
        """Of a recommendation by this version; those that this process never had are counted as one, `other`: without a
        secret anybody can make their names up."""
        labels = version if version in self._versions else "other", source, str(steps)
        if added.is_new:
            self.feedback.labels(*labels, event).inc()
        if added.is_first_hit:
            self.hits.labels(*labels).inc()

    # What the recommender reports (serving.online.observer.Observer)

    def batch_ran(self, searches: int, beam_rows: int, seconds: dict[str, float]) -> None:
        self.batch_size.observe(searches)
        self.beam_rows.observe(beam_rows)
        for stage in ("encode", "reason", "decode"):
            self.stages[stage].observe(seconds.get(stage, 0.0))

    def searched(self, steps: int, seconds: dict[str, float]) -> None:
        self.reasoning_steps.observe(steps)
        for stage, each in seconds.items():
            self.stages[stage].observe(each)

    def answered(self, version: str, source: str, steps: int, seconds: float) -> None:
        self._answered_by(version, source, str(steps)).inc()
        self._seconds_by(version).observe(seconds)

    def shadowed(self, version: str, overlap: float) -> None:
        self.shadow_overlap.labels(version).observe(overlap)

    def shadow_failed(self, version: str, reason: str) -> None:
        self.shadow_failures.labels(version, reason).inc()

    def fell_back(self, reason: Fallback) -> None:
        self.fallback.labels(reason).inc()

    def dropped_invalid_items(self, count: int) -> None:
        self.invalid_items.inc(count)

    def text(self) -> bytes:
        """The text that Prometheus scrapes. With several workers: the sum over all, including those that have died."""
        return generate_latest(self._everywhere())

    def samples(self, *names: str) -> list[Sample]:
        """Those of these names, with several workers as in `text`."""
        families = self._everywhere().collect()
        return [sample for family in families for sample in family.samples if sample.name in names]

    def _everywhere(self) -> CollectorRegistry:
        if not self.shared:
            return self.registry
        everywhere = CollectorRegistry()
        MultiProcessCollector(everywhere)  # type: ignore[no-untyped-call]
        return everywhere


class Scrapes:
    """Answers /metrics off the event loop: one rendering at a time, for all who have asked by the time it begins, and
    for at most SCRAPE_SHARE of the time. Whoever asks without pause waits; other requests do not."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._one = asyncio.Lock()
        self._not_before = 0.0
        self._next: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        """What happened before the call is in it."""
        if self._next is None:
            self._next = asyncio.create_task(self._render())
        return await asyncio.shield(self._next)  # one who leaves must not cancel it for the others

    async def _render(self) -> bytes:
        async with self._one:
            await asyncio.sleep(self._not_before - time.monotonic())
            self._next = None  # it begins: those who ask from now on share another
            self._metrics.tasks.set(len(asyncio.all_tasks()))  # shows tasks that never end
            self._metrics.threads.set(threading.active_count())
            started = time.monotonic()
            text = await asyncio.to_thread(self._metrics.text)
            ended = time.monotonic()
            self._not_before = ended + (ended - started) * (1 / SCRAPE_SHARE - 1)
            return text
