"""Traces as a collector gets them, and the service where there is no collector or no OpenTelemetry."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app import traces
from app.main import create_app
from tests.app.collector import Collector, attributes
from tests.app.conftest import ShapedEngine, Start, ready, settings
from tests.app.test_recommend import HISTORY, ask


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_span_per_request_and_one_per_stage_below_the_callers(engine: ShapedEngine, collector: Collector) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "shop=7", "X-Request-ID": "r-1"}
    with TestClient(create_app(settings(otlp_endpoint=collector.address), engine)) as client:
        ready(client)
        answer = client.post("/recommend?reasoning_steps=2", json={"history": HISTORY, "user_id": "u"}, headers=headers)
        assert answer.status_code == 200 and client.get("/users/nobody").status_code == 404
    spans = collector.spans  # all are sent by the end of the application
    (top,) = (span for span in spans if span.name == "POST /recommend")
    assert (top.trace_id.hex(), top.parent_span_id.hex()) == (trace, parent)
    assert top.trace_state == "shop=7"
    told = attributes(top)
    assert told["http.route"] == "/recommend" and told["http.response.status_code"] == 200
    assert told["streamrec.request_id"] == "r-1" and told["streamrec.reasoning_steps"] == 2
    assert told["streamrec.cache"] == "miss" and told["streamrec.model_version"] == engine.bundle.version
    stages = [span for span in spans if span.parent_span_id == top.span_id]
    assert {"encode", "reason", "decode"} <= {span.name for span in stages} <= set(traces.STAGES)
    timings = answer.json()["timings_ms"]
    for stage in stages:
        assert stage.end_time_unix_nano - stage.start_time_unix_nano == pytest.approx(1e6 * timings[stage.name], abs=1)
        assert top.start_time_unix_nano <= stage.start_time_unix_nano and stage.trace_id == top.trace_id
    assert any(span.name == "GET /users/{user_id}" for span in spans)


def test_a_collector_that_does_not_answer_holds_up_neither_answers_nor_the_end(engine: ShapedEngine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and that is all it does
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with TestClient(create_app(settings(otlp_endpoint=address), engine)) as client:
            ready(client)
            assert ask(client, history=HISTORY).status_code == 200


def test_without_the_packages_the_service_runs_the_same(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "INSTALLED", False)
    with caplog.at_level(logging.WARNING, "streamrec.traces"):
        client = start(otlp_endpoint="http://127.0.0.1:1")
    assert "streamrec[otel]" in caplog.text
    assert ask(client, history=HISTORY).status_code == 200
