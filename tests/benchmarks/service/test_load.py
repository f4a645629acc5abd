"""The load generator against a test server: an open loop whatever the server does, its verdict, and its traffic."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.common import ROOT
from benchmarks.service.load import plot, send
from benchmarks.service.traffic import LONGEST, Traffic, body, phase_at, profile, zipf
from tests.conftest import free_port
from tests.waiting import eventually

ITEMS, CATEGORIES = [f"i{n}" for n in range(100)], ["a", "b"]
ANSWER = {"reasoning_steps": 0, "beam_width": 50, "cache": "miss", "timings_ms": {"total": 1.0}}


class Server(ThreadingHTTPServer):
    """Answers as the service does, after `delay` seconds, with `status`."""

    daemon_threads, request_queue_size = False, 500  # closing waits for the last connection

    def __init__(self, delay: float, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.status = delay, status
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        models = {"models": [{"categories": CATEGORIES}]}
        self._reply(200, models if self.path == "/models" else {"items": [{"item_id": name} for name in ITEMS]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(self.server.delay)
        good = set(body) <= {"user_id", "history", "categories", "deny", "allow", "timeout_ms"} and body["history"]
        status = self.server.status if good else 422
        self._reply(status, ANSWER if status == 200 else {"type": "urn:streamrec:problem:overloaded"})

    def _reply(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


StartServer = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[StartServer]:
    servers: list[Server] = []

    def start(delay: float = 0.0, status: int = 200) -> Server:
        servers.append(Server(delay, status))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def flat(server: Server, rate: int, seconds: float, *options: str) -> tuple[dict[str, float], list[str]]:
    found = send(server.address, ["--rates", str(rate), "--phase-seconds", str(seconds), *options])
    (row,) = found["rows"]
    return row, found["failed"]


def expected(sent: float, mean: float) -> bool:
    """Within four standard deviations of Poisson, or fewer where the machine has no time to send: half at the least."""
    return mean / 2 < sent < mean + 4 * mean**0.5


def test_a_slow_service_is_sent_no_less(start: StartServer) -> None:
    """In a closed loop, sources that wait two seconds for each answer could send a third of this at most."""
    row, failed = flat(start(delay=2.0), rate=40, seconds=4)
    assert expected(row["sent"], 160)
    assert row["p50_ms"] > 2000
    assert failed and "p99" in failed[0]


def test_rates_take_turns(start: StartServer) -> None:
    found = send(start().address, ["--rates", "10,40", "--rounds", "3", "--phase-seconds", "1"])
    assert [row["phase"] for row in found["rows"]] == ["10", "40"]
    assert expected(found["rows"][0]["sent"], 30) and expected(found["rows"][1]["sent"], 120)
    slow, fast = ([one["at"] for one in found["answers"][rate]] for rate in ("10", "40"))
    assert min(slow) < min(fast) < max(slow), "the first comes again after the second"


def test_a_fast_service_passes(start: StartServer) -> None:
    row, failed = flat(start(), 20, 3, "--p99-ms", "60000")  # a busy machine answers late
    assert not failed
    assert row["failed"] == row["rejected"] == 0


@pytest.mark.parametrize(("status", "kind"), [(500, "failed"), (503, "rejected")])
def test_a_service_that_does_not_answer_fails(start: StartServer, status: int, kind: str) -> None:
    row, failed = flat(start(status=status), rate=20, seconds=2)
    assert row[kind] == 1
    assert any("got no answer" in reason for reason in failed)


def test_the_page_starts_the_same_load(start: StartServer) -> None:
    """Locust with its page, started by the page's own form: requests arrive, and the page counts them."""
    port = free_port()
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/service/locustfile.py", "--host", start().address]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--loglevel", "ERROR"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as page,
    ):
        try:
            until(lambda: "locust" in page.get("/").text.lower())
            form = {"rates": "30", "phase_seconds": "2", "user_count": "1", "spawn_rate": "1"}
            assert page.post("/swarm", data=form).json()["success"] is True
            until(lambda: page.get("/stats/requests").json()["state"] == "stopped")
            counted = page.get("/stats/requests").json()["stats"]
            sent = next(row["num_requests"] for row in counted if row["name"] == "Aggregated")
            assert expected(sent, 60)
        finally:
            process.terminate()


def until(check: Callable[[], bool]) -> None:
    """Waits until `check` holds, however long the page takes to be there."""

    def holds() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return check()
        return False

    eventually(holds)


def test_phases_follow_each_other() -> None:
    phases = profile(60, 10)
    assert phase_at(phases, 0) is phases[0]
    ends = np.cumsum([phase.seconds for phase in phases])
    assert [phase_at(phases, end) for end in ends] == [*phases[1:], None]
    rates = {phase.name: phase.rate for phase in phases}
    assert rates["ramp 1"] < rates["ramp 5"] < rates["steady"] < rates["spike"]
    assert [phase.name for phase in phases if phase.judged] == ["steady"]
    assert all(phase.rate >= 1 for phase in profile(1, 10))


def test_users_follow_zipfs_law() -> None:
    traffic, counts = Traffic(50, 100, skew=1.0, seed=3), np.zeros(50)
    for _ in range(20_000):
        counts[traffic.next().user] += 1
    expected = 20_000 * zipf(50, 1.0)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_sessions_grow_and_a_version_is_one_history() -> None:
    traffic, seen, last = Traffic(5, 100, seed=1), {}, {}
    repeated = 0
    for _ in range(3000):
        request = traffic.next()
        assert seen.setdefault((request.user, request.version), request.history) == request.history
        before = last.get(request.user, ())
        assert request.history in (before, (*before, request.history[-1]), request.history[-1:])
        repeated += request.history == before
        last[request.user] = request.history
    assert max(len(history) for history in seen.values()) == LONGEST
    assert repeated / 3000 == pytest.approx(0.4, abs=0.05)


def test_every_request_is_one_the_service_takes() -> None:
    from app.schemas.recommend import RecommendRequest

    traffic, kinds = Traffic(20, len(ITEMS), seed=2), set()
    for _ in range(300):
        request = traffic.next()
        query, sent = body(request, ITEMS, CATEGORIES)
        RecommendRequest.model_validate(sent)
        assert query["reasoning_steps"] in ("0", "2", "4", "auto")
        kinds |= sent.keys()
    assert kinds == {"user_id", "history", "categories", "deny", "allow", "timeout_ms"}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    row = {"p50_ms": 5.0, "p95_ms": 8.0, "p99_ms": 9.0, "rejected": 0.0, "failed": 0.0}
    rows = [row | {"sent_per_s": load} for load in (5.0, 10.0)]
    plot({"rows": rows, "limits": {"p99_ms": 250}}, tmp_path / "load.svg")
    assert "requests sent a second" in (tmp_path / "load.svg").read_text()
