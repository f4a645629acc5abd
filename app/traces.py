"""Traces (OpenTelemetry, OTLP over HTTP). The extra `otel` is optional: without it, no traces are sent.

One span per request, a child of the caller's `traceparent`, and below it one span per stage. All are recorded after the
request, from times that are measured anyway. They hold no id of a user or item, no body and no key.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    INSTALLED = True
except ImportError:
    INSTALLED = False

if TYPE_CHECKING:
    from app.schemas.answers import RecommendResponse

log = logging.getLogger("streamrec.traces")

# In the order in which a request passes them; their spans are laid end to end from the request's start.
STAGES = ("cache", "queue", "encode", "reason", "decode")
ATTRIBUTES = ("model_version", "source", "reasoning_steps", "beam_width", "cache")  # of a recommendation
TRACE_CONTEXT = ("traceparent", "tracestate")  # the headers in which a caller passes its trace on (W3C)
EXPORT_TIMEOUT = 2  # seconds; a collector that is down must not delay shutdown


class Traces:
    """Sends spans to the collector. provider: None if no endpoint is set or the packages are missing."""

    def __init__(self, endpoint: str | None, version: str) -> None:
        self.provider: TracerProvider | None = None
        if endpoint is None:
            return
        if not INSTALLED:
            log.warning("no traces are sent; install the extra: pip install 'streamrec[otel]'")
            return
        exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_TIMEOUT)
        self.provider = TracerProvider(
            resource=Resource.create({"service.name": "streamrec", "service.version": version}),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("streamrec", version)

    def record(
        self, caller: dict[str, str], method: str, route: str, status: int, request_id: str, seconds: float,
        answer: RecommendResponse | None = None,
    ) -> None:  # fmt: skip
        """Records a request that has just finished. answer: its recommendation, if it has one. caller: the headers of
        TRACE_CONTEXT, empty where they were not sent."""
        if self.provider is None:
            return
        end = time.time_ns()
        start = end - round(1e9 * seconds)
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "streamrec.request_id": request_id,
        }
        if answer is not None:
            attributes |= {f"streamrec.{name}": getattr(answer, name) for name in ATTRIBUTES}
        parent = TraceContextTextMapPropagator().extract(caller)
        span = self._tracer.start_span(f"{method} {route}", parent, SpanKind.SERVER, attributes, start_time=start)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        begin = start
        for stage in STAGES:
            if ms := getattr(answer.timings_ms, stage) if answer is not None else 0.0:
                child = self._tracer.start_span(stage, set_span_in_context(span), start_time=begin)
                begin += round(1e6 * ms)
                child.end(begin)
        span.end(end)

    def close(self) -> None:
        """Sends the remaining spans. Blocks for at most a few seconds."""
        if self.provider is not None:
            self.provider.shutdown()
