"""Every metric of the contract is there, in base units, and moves when what it counts happens."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serving.types import Answer
from tests.app.conftest import ShapedEngine, Start
from tests.app.test_recommend import HISTORY, ask
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually

Sample = tuple[str, dict[str, str]]


def read(client: TestClient, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def recommend(client: TestClient, user: str | None = None) -> None:
    answer = ask(client, 2, user_id=user or uuid.uuid4().hex, history=HISTORY)
    assert answer.json()["source"] == "model"


MOVES: list[tuple[str, dict[str, str], Callable[[TestClient], object]]] = [
    ("streamrec_request_seconds_count", {"route": "/recommend", "status": "200"}, recommend),
    ("streamrec_request_seconds_count", {"route": "/recommend", "status": "422"}, lambda client: ask(client, k=0)),
    ("streamrec_request_seconds_count", {"route": "/users/{user_id}", "status": "404"},
     lambda client: client.get("/users/nobody")),
    *((("streamrec_stage_seconds_count", {"stage": stage}, recommend))
      for stage in ("queue", "cache", "encode", "reason", "decode", "serialise")),
    ("streamrec_batch_size_sum", {}, recommend),
    ("streamrec_beam_rows_sum", {}, recommend),
    ("streamrec_reasoning_steps_sum", {}, recommend),
    ("streamrec_cache_total", {"tier": "memory", "result": "miss"}, recommend),
    ("streamrec_cache_total", {"tier": "memory", "result": "hit"},
     lambda client: [recommend(client, "u"), recommend(client, "u")]),
    ("streamrec_rejected_total", {"reason": "deadline_exceeded"},
     lambda client: ask(client, 4, history=HISTORY, timeout_ms=0.001)),
    ("streamrec_fallback_total", {"reason": "cold_user"}, ask),
    ("streamrec_fallback_total", {"reason": "unknown_items"}, lambda client: ask(client, history=["new"])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "labels", "happens"), MOVES)
def test_it_moves(
    shared: TestClient, name: str, labels: dict[str, str], happens: Callable[[TestClient], object]
) -> None:
    before = read(shared, name, **labels)
    happens(shared)
    assert read(shared, name, **labels) > before


def test_what_may_be_counted_is_zero_before_it_is(start: Start) -> None:
    client = start()
    families = text_string_to_metric_families(client.get("/metrics").text)
    zero = {
        (sample.name, *sorted(sample.labels.values()))
        for family in families
        for sample in family.samples
        if sample.value == 0
    }
    reasons = (
        "deadline_exceeded draining engine_dead forbidden head_too_large host_not_allowed malformed_request not_ready "
        "over_quota overloaded store_unavailable too_large too_slow unauthorised"
    )
    assert {("streamrec_rejected_total", reason) for reason in reasons.split()} <= zero
    fallbacks = {("streamrec_fallback_total", reason) for reason in ("cold_user", "unknown_items", "store_unavailable")}
    assert fallbacks <= zero
    results = {
        "memory": ("hit", "miss", "stale", "invalid", "cleared"),
        "redis": ("hit", "miss", "stale", "invalid", "error", "stored", "too_large", "write_error"),
    }
    accesses = {("streamrec_cache_total", *sorted((tier, each))) for tier in results for each in results[tier]}
    assert accesses <= zero


def test_beams_and_steps_are_measured_in_their_own_units(client: TestClient) -> None:
    names = ("streamrec_batch_size_sum", "streamrec_beam_rows_sum", "streamrec_reasoning_steps_sum")
    before = [read(client, name) for name in names]
    ask(client, 3, history=HISTORY, beam_width=70)
    assert [read(client, name) - value for name, value in zip(names, before, strict=True)] == [1, 70, 3]


def test_the_redis_tier_counts_hits_misses_and_rubbish(start: Start, redis_server: RedisServer) -> None:
    client = start(redis_url=redis_server.url, redis_timeout_ms=2000, memory_cache_users=0)
    recommend(client, "u")
    recommend(client, "u")
    assert read(client, "streamrec_cache_total", tier="redis", result="miss") == 1
    assert read(client, "streamrec_cache_total", tier="redis", result="hit") == 1


def test_the_queue_is_as_deep_as_what_waits(client: TestClient, engine: ShapedEngine) -> None:
    reached, opened = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert opened.wait(DEADLINE)

    assert read(client, "streamrec_queue_depth") == 0
    engine.before = hold
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, client, 2, history=HISTORY)]
        assert reached.wait(DEADLINE)
        asked += [pool.submit(ask, client, 2, history=HISTORY) for _ in range(3)]
        eventually(lambda: client.app.state.service.batcher.depth == 3)  # type: ignore[attr-defined]
        assert read(client, "streamrec_queue_depth") == 3
        opened.set()
        assert {each.result().status_code for each in asked} == {200}
    assert read(client, "streamrec_queue_depth") == 0


def test_the_model_is_named_and_invalid_items_are_counted(client: TestClient, engine: ShapedEngine) -> None:
    assert read(client, "streamrec_model_info", version=engine.bundle.version) == 1
    assert read(client, "streamrec_invalid_items_total") == 0

    def spoil(answers: list[Answer]) -> list[Answer]:
        for answer in answers:
            answer.items[0] = 1  # which has been seen
        return answers

    engine.after = spoil
    assert "i1" not in {item["item_id"] for item in ask(client, 2, history=HISTORY).json()["items"]}
    assert read(client, "streamrec_invalid_items_total") == 1


def test_times_are_seconds_in_buckets_from_a_millisecond(client: TestClient) -> None:
    recommend(client)
    for family in text_string_to_metric_families(client.get("/metrics").text):
        if family.name in ("streamrec_request_seconds", "streamrec_stage_seconds"):
            assert family.type == "histogram" and family.documentation
            bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
            assert min(bounds) == 0.001 and {0.01, 0.25} <= bounds
