"""Readiness that tells the truth, overload, deadlines, a dying engine, and the end."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.lifecycle import Service
from app.loading import calibration
from app.main import create_app
from serving.engine import Engine
from serving.online.batcher import FAILURES
from serving.online.changelog import FileLog, Logged
from serving.online.costs import WINDOW, CostTable
from serving.types import Answer
from tests.app.conftest import Gate, ShapedEngine, Start, log_line, ready, settings
from tests.app.test_recommend import HISTORY, ask
from tests.builders import measured_gains, tiny_model
from tests.waiting import DEADLINE, eventually, eventually_async


@pytest.fixture
def gate(client: TestClient, engine: ShapedEngine) -> Gate:
    """The client's engine holds still from now on."""
    engine.before = Gate()
    return engine.before


def test_alive_but_not_ready_while_warming(start: Start, engine: ShapedEngine) -> None:
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    client = start(wait=False)
    assert gate.reached.wait(DEADLINE)
    assert client.get("/livez").status_code == 200
    ready = client.get("/readyz")
    assert ready.status_code == 503 and ready.json()["reason"] == "warming"
    for response in (ask(client, history=HISTORY), client.get("/items"), client.get("/models")):
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert client.get("/").status_code == 200
    assert "streamrec_queue_depth" in client.get("/metrics").text
    gate.opened.set()


def test_not_ready_before_the_changes_made_earlier_are_replayed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = threading.Event(), FileLog.read

    async def held(log: FileLog, after: str, wait: float = 0.0) -> list[Logged]:
        await eventually_async(opened.is_set)
        return await read(log, after, wait)

    monkeypatch.setattr(FileLog, "read", held)
    client = start(wait=False, state_dir=tmp_path)
    eventually(lambda: client.get("/readyz").json()["status"] == "replaying")
    assert client.get("/readyz").status_code == ask(client, history=HISTORY).status_code == 503
    assert client.get("/livez").status_code == 200
    opened.set()
    eventually(lambda: client.get("/readyz").status_code == 200)


def test_a_damaged_log_of_changes_ends_the_start_in_one_sentence(tmp_path: Path, real_engine: Engine) -> None:
    (tmp_path / "changes.jsonl").write_text("rubbish\n{}\n")
    failures: list[BaseException] = []
    app = create_app(settings(state_dir=tmp_path), real_engine, on_failure=failures.append)
    with TestClient(app) as client:
        eventually(lambda: failures)
        assert client.get("/readyz").status_code == 503
    assert "is damaged at 0; restore it" in str(failures[0])


def test_draining_is_not_ready_finishes_what_runs_and_takes_nothing_new(client: TestClient, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        client.app.state.service.begin_drain()  # type: ignore[attr-defined]
        assert client.get("/readyz").status_code == 503 and client.get("/readyz").json()["reason"] == "draining"
        assert client.get("/livez").status_code == 200
        refused = ask(client, history=HISTORY)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert refused.json()["type"].endswith("draining")
        gate.opened.set()
        assert running.result().status_code == 200


def test_a_dead_engine_is_neither_ready_nor_alive(client: TestClient, engine: ShapedEngine) -> None:
    def die() -> None:
        raise SystemExit("the device is gone")

    engine.before = die
    response = ask(client, history=HISTORY)
    assert response.status_code == 503 and response.json()["type"].endswith("engine-dead")
    for probe in ("/livez", "/readyz"):
        assert client.get(probe).status_code == 503 and client.get(probe).json()["status"] == "engine dead"
    assert ask(client, history=HISTORY).status_code == 503


def test_an_engine_that_fails_at_everything_is_neither_ready_nor_alive_and_the_log_says_why(
    client: TestClient, engine: ShapedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine.before = fail
    statuses = []
    while client.get("/livez").status_code == 200:
        statuses.append(ask(client, history=HISTORY).status_code)
    assert set(statuses[:FAILURES]) == {500} and set(statuses[FAILURES:]) <= {503, 500}
    assert client.get("/readyz").status_code == 503 and client.get("/readyz").json()["status"] == "engine dead"
    (line,) = [record for record in caplog.records if "the engine is dead" in record.message]
    assert line.exc_info is not None and "device-side" in str(line.exc_info[1].__cause__)  # type: ignore[union-attr]


def test_a_poisonous_request_however_often_leaves_the_engine_alive(client: TestClient, engine: ShapedEngine) -> None:
    def fail_for(answers: list[Answer]) -> list[Answer]:
        if any(request.k == 7 for request in engine.searched[-1]):
            raise RuntimeError("poison")
        return answers

    engine.after = fail_for
    assert {ask(client, history=HISTORY, k=7).status_code for _ in range(4 * FAILURES)} == {500}
    assert client.get("/livez").status_code == 200 and ask(client, history=HISTORY).status_code == 200


def test_a_hung_engine_is_neither_ready_nor_alive_and_the_log_says_where_it_hangs(
    start: Start, engine: ShapedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("app.lifecycle", "serving.online.watchdog"):
        monkeypatch.setattr(f"{module}.LOOK_EVERY", 0.05)
    client = start(hung_after_s=0.2)
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    monkeypatch.setattr("serving.online.watchdog.SLOWEST", 0.0)
    answer = ask(client, history=HISTORY)
    assert answer.status_code == 503 and answer.json()["type"].endswith("engine-dead")
    for probe in ("/livez", "/readyz"):
        assert client.get(probe).status_code == 503
    (line,) = [record for record in caplog.records if "the engine is dead" in record.message]
    assert "self.opened.wait" in line.stack  # type: ignore[attr-defined]
    gate.opened.set()


def test_a_start_that_hangs_is_dead_and_stays_so_when_it_ends_after_all(
    start: Start, engine: ShapedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("app.lifecycle", "serving.online.watchdog"):
        monkeypatch.setattr(f"{module}.LOOK_EVERY", 0.05)
    caplog.set_level(logging.INFO)
    hung = Gate()
    monkeypatch.setattr(engine, "warm_up", hung)
    client = start(wait=False, start_timeout_s=0.5)
    assert client.get("/livez").status_code == 200
    eventually(lambda: client.get("/livez").status_code == 503)
    assert client.get("/readyz").json()["reason"] == "engine dead"
    (line,) = [record for record in caplog.records if "the engine is dead" in record.message]
    assert "self.opened.wait" in line.stack  # type: ignore[attr-defined]
    followed = threading.Event()
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    follow = service._follow_changes
    monkeypatch.setattr(service, "_follow_changes", lambda: followed.set() or follow())
    hung.opened.set()
    assert followed.wait(DEADLINE)
    assert client.get("/readyz").status_code == 503 and "ready" not in caplog.messages


def test_a_bundle_that_cannot_be_opened_is_told_and_not_ready(tmp_path) -> None:  # type: ignore[no-untyped-def]
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    with TestClient(create_app(settings(bundle=tmp_path), on_failure=on_failure)) as client:
        assert told.wait(DEADLINE)
        assert "bundle.json" in str(failures[0])
        assert client.get("/readyz").status_code == 503


def test_an_unexpected_error_is_a_500_that_tells_nothing_and_spoils_nothing(
    client: TestClient, engine: ShapedEngine
) -> None:
    def fail() -> None:
        engine.before = lambda: None
        raise ValueError("secret inside")

    engine.before = fail
    response = ask(client, history=HISTORY)
    assert response.status_code == 500 and "secret" not in response.text
    assert response.headers["content-type"] == "application/problem+json" and response.headers["x-request-id"]
    assert ask(client, history=HISTORY).status_code == 200


def test_a_full_queue_is_503_with_retry_after(start: Start, engine: ShapedEngine) -> None:
    client = start(max_queue_ms=100_000)
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    slow(service.costs, seconds=80)
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(ask, client, 2, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        waiting = pool.submit(ask, client, 2, history=HISTORY, beam_width=100)
        eventually(lambda: service.batcher.depth == 1)
        encoded = engine.encoded
        refused = ask(client, 2, user_id="u", history=HISTORY)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["type"].endswith("overloaded")
        gate.opened.set()
        assert [call.result().status_code for call in (running, waiting)] == [200, 200]
    assert engine.encoded == encoded + 1  # the refused one cost no compute
    assert 'streamrec_rejected_total{reason="overloaded"} 1.0' in client.get("/metrics").text


def test_a_full_server_refuses_without_reading_and_without_a_line_each(
    start: Start, engine: ShapedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamrec")
    client = start(max_queue_ms=250_000)
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    slow(service.costs, seconds=200)
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask, client, 2, history=HISTORY)]
        assert gate.reached.wait(DEADLINE)
        calls.append(pool.submit(ask, client, 2, history=HISTORY))
        eventually(lambda: service.batcher.depth == 1)
        unread = {"content": b"{", "headers": {"Content-Type": "application/json"}}
        assert client.post("/recommend", **unread).status_code == 422  # type: ignore[arg-type]
        assert ask(client, 2, history=HISTORY).status_code == 503
        refused = client.post("/recommend", **unread)  # type: ignore[arg-type]
        assert refused.status_code == 503 and 300 <= int(refused.headers["retry-after"]) <= 400  # 200 s run, 200 s wait
        assert refused.json()["retry_after"] == int(refused.headers["retry-after"]) and refused.headers["x-request-id"]
        gate.opened.set()
        assert [call.result().status_code for call in calls] == [200, 200]
    assert 'streamrec_rejected_total{reason="overloaded"} 2.0' in client.get("/metrics").text
    told = [record.__dict__["status"] for record in caplog.records if record.name == "streamrec.http"]
    assert sorted(told) == [200, 200, 422]


def test_a_budget_that_passes_in_the_queue_is_504_in_time(client: TestClient, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, 2, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        slow(client.app.state.service.costs, 0.001)  # type: ignore[attr-defined]
        assert ask(client, 0, history=HISTORY, timeout_ms=300).status_code == 504  # while the gate is still shut
        gate.opened.set()
        assert running.result().status_code == 200
    assert 'streamrec_rejected_total{reason="deadline_exceeded"} 1.0' in client.get("/metrics").text


VERSION = "tiny-0"  # of the tests' engine


def slow(costs: CostTable, seconds: float, steps: Iterable[int] = range(5), rows: Iterable[int] | None = None) -> None:
    """Makes the cost table believe that searches take so long."""
    for each in steps:
        for measured in rows or [entry["beam_rows"] for entry in costs.table(VERSION)]:
            for _ in range(WINDOW):
                costs.observe(each, measured, seconds, VERSION)


def test_auto_takes_the_most_steps_that_fit_where_no_gain_was_measured(client: TestClient) -> None:
    costs = client.app.state.service.costs  # type: ignore[attr-defined]
    slow(costs, 0.001)
    slow(costs, 100, steps=(3, 4))
    # what is measured says 3 and 4 take 100 s; the search itself is fast
    assert ask(client, "auto", history=HISTORY, timeout_ms=50_000).json()["reasoning_steps"] == 2
    assert ask(client, "auto", history=HISTORY, timeout_ms=500_000).json()["reasoning_steps"] == 4
    assert ask(client, "auto", history=HISTORY).json()["reasoning_steps"] == 4
    assert (
        ask(client, history=HISTORY, timeout_ms=500_000).json()["reasoning_steps"] == 2
    )  # the bundle's default at most
    assert ask(client, history=HISTORY).json()["reasoning_steps"] == 2


@pytest.mark.parametrize(
    ("gains", "auto"),
    [
        ([(0.003, -0.001, 0.007), (0.004, 0.0, 0.008), (0.0, -0.004, 0.004), (-0.005, -0.009, -0.001)], 0),
        ([(0.003, -0.001, 0.007), (0.02, 0.015, 0.025), (0.021, 0.016, 0.026), (0.022, 0.017, 0.027)], 2),
    ],
)
def test_auto_takes_no_steps_that_gain_nothing(gains: list[tuple[float, float, float]], auto: int) -> None:
    engine = ShapedEngine(Engine(tiny_model(accuracy=measured_gains(gains), default_steps=auto)))
    with TestClient(create_app(settings(), engine)) as client:
        ready(client)
        costs = client.app.state.service.costs  # type: ignore[attr-defined]
        slow(costs, 0.001)
        for requested, timeout in product(("auto", None), (None, 50_000)):
            assert ask(client, requested, history=HISTORY, timeout_ms=timeout).json()["reasoning_steps"] == auto
        slow(costs, 100, steps=(2, 3, 4))
        # one step would be in time, and gains nothing; estimates are kept for a moment
        eventually(lambda: ask(client, "auto", history=HISTORY, timeout_ms=50_000).json()["reasoning_steps"] == 0)
        assert ask(client, 1, history=HISTORY, timeout_ms=50_000).json()["reasoning_steps"] == 1


def test_a_budget_without_a_number_of_steps_takes_fewer_and_a_number_is_kept(client: TestClient) -> None:
    costs = client.app.state.service.costs  # type: ignore[attr-defined]
    slow(costs, 0.001)
    slow(costs, 100, steps=(2, 3, 4))
    assert ask(client, history=HISTORY, timeout_ms=50_000).json()["reasoning_steps"] == 1  # the default is 2
    assert ask(client, 2, history=HISTORY, timeout_ms=50_000).status_code == 504
    assert ask(client, 2, history=HISTORY, timeout_ms=500_000).json()["reasoning_steps"] == 2


def test_auto_narrows_the_beam_when_no_number_of_steps_fits(client: TestClient) -> None:
    costs = client.app.state.service.costs  # type: ignore[attr-defined]
    slow(costs, 500)
    slow(costs, 0.001, steps=(0, 1), rows=(25,))
    answer = ask(client, "auto", history=HISTORY, timeout_ms=150_000).json()
    assert (answer["reasoning_steps"], answer["beam_width"]) == (1, 25) and len(answer["items"]) == 10
    assert ask(client, "auto", history=HISTORY, timeout_ms=150_000, k=30).status_code == 504  # no beam narrower than k


def test_a_budget_that_nothing_fits_is_504_early(client: TestClient, engine: ShapedEngine) -> None:
    slow(client.app.state.service.costs, 500)  # type: ignore[attr-defined]
    searched = len(engine.searched)
    for asked in ("auto", None, 4):
        assert ask(client, asked, history=HISTORY, timeout_ms=400_000).status_code == 504  # early: it does not wait
    assert len(engine.searched) == searched


def test_a_budget_that_only_the_queue_uses_up_is_503_early(client: TestClient, engine: ShapedEngine) -> None:
    """It would fit an idle engine, so trying again makes sense."""
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    slow(service.costs, 200)
    slow(service.costs, 100, steps=(0, 1))
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, client, 4, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        waiting = pool.submit(ask, client, 4, history=HISTORY)
        eventually(lambda: service.batcher.depth == 1)
        for asked in ("auto", 1):
            refused = ask(client, asked, history=HISTORY, timeout_ms=150_000)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert running.result().status_code == waiting.result().status_code == 200


def test_the_cost_table_is_measured_at_start_and_kept_up_to_date(client: TestClient) -> None:
    def runs(steps: int, rows: int) -> int:
        cost = client.get("/models").json()["models"][0]["cost"]
        return sum(entry["runs"] for entry in cost if (entry["reasoning_steps"], entry["beam_rows"]) == (steps, rows))

    assert all(runs(steps, rows) for steps in range(5) for rows in (10, 25, 50))
    assert all(runs(steps, rows) for steps in (0, 2, 4) for rows in (100, 200))  # none, the default, the most
    assert not any(runs(steps, rows) for steps in (1, 3) for rows in (100, 200))
    before = runs(2, 50)
    ask(client, 2, history=HISTORY)
    assert runs(2, 50) == before + 1


def test_on_a_gpu_every_shape_is_run_at_start_so_that_no_request_waits_for_a_graph(engine: ShapedEngine) -> None:
    batches = calibration(settings(runtime="cuda"), engine)
    shapes = {(batch[0].request.reasoning_steps, len(batch)) for batch in batches}
    assert shapes == set(product(range(5), (1, 2, 4)))


def test_a_client_that_goes_away_costs_no_search(client: TestClient, engine: ShapedEngine, gate: Gate) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, 2, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        assert client.portal is not None
        outcome = client.portal.call(_leave_early, client.app, service)
        assert outcome == (1, 0)
        gate.opened.set()
        running.result()
    assert all(request.history != (9,) for batch in engine.searched for request in batch)


async def _leave_early(app, service):  # type: ignore[no-untyped-def]
    """Sends a request and hangs up while it waits. Returns the queue's depth before and after."""
    import asyncio

    gone = asyncio.Event()
    sent = [{"type": "http.request", "body": b'{"history": ["i9"]}', "more_body": False}]

    async def receive():  # type: ignore[no-untyped-def]
        if sent:
            return sent.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):  # type: ignore[no-untyped-def]
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/recommend", "raw_path": b"/recommend", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    call = asyncio.ensure_future(app(scope, receive, send))
    await eventually_async(lambda: service.batcher.depth)
    before = service.batcher.depth
    gone.set()
    await call
    return before, service.batcher.depth


@pytest.mark.parametrize("path", ["/recommend", "/recommend/batch", "/users/u/events"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_499_and_no_error(
    client: TestClient, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamrec")
    assert client.portal is not None
    client.portal.call(_leave_in_the_middle, client.app, path)
    (line,) = (record for record in caplog.records if record.name == "streamrec.http")
    assert line.__dict__["status"] == 499 and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    text = client.get("/metrics").text
    assert re.search('streamrec_request_seconds_count{.*status="499"} 1.0', text) and 'status="500"' not in text


async def _leave_in_the_middle(app, path):  # type: ignore[no-untyped-def]
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"hist', "more_body": True}]

    async def receive():  # type: ignore[no-untyped-def]
        return messages.pop() if len(messages) > 1 else messages[0]

    async def send(message):  # type: ignore[no-untyped-def]
        pass

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"100")], "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)


def test_a_drain_has_one_deadline_whatever_hangs(start: Start, engine: ShapedEngine) -> None:
    client = start(drain_timeout_s=0.2)
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    gate = Gate()
    engine.before = gate  # type: ignore[assignment]
    assert client.portal is not None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask, client, history=HISTORY)
        assert gate.reached.wait(DEADLINE)
        client.portal.call(service.drain)  # the engine hangs, and it returns
        assert service.drain_time_left == 0
        client.portal.call(service.drain)
        assert service.batcher.depth == 0
        gate.opened.set()


class Lines(logging.Handler):
    """The lines that the service writes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(log_line(record)))


def test_what_the_log_is_said_to_have_is_there(client: TestClient, engine: ShapedEngine) -> None:
    sent = "a secret of the client's"

    def fail() -> None:
        raise RuntimeError(sent)

    engine.before = fail
    log, logger = Lines(), logging.getLogger("streamrec")
    logger.addHandler(log)
    try:
        body = {"history": HISTORY}
        single = client.post("/recommend", json=body, headers={"X-Request-ID": "find-me-1"})
        batch = client.post("/recommend/batch", json={"requests": [body]}, headers={"X-Request-ID": "find-me-2"})
    finally:
        logger.removeHandler(log)
    assert "search the log for this request's X-Request-ID" in single.json()["detail"]
    assert batch.json()["results"][0]["detail"] == single.json()["detail"]
    for name in ("find-me-1", "find-me-2"):
        found = [line for line in log.lines if line.get("request_id") == name]
        assert any("RuntimeError" in line["exception"] for line in found), name
        assert sent not in json.dumps(found)  # the traceback's own lines may say "secret"
