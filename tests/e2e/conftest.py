"""The real service: `python -m app serve` as a process of its own, on a free port, over a small random bundle."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import tiny_bundle
from tests.waiting import DEADLINE

# With these and the slow bundle a few calls keep the queue full for seconds, on any machine, and none of them is late.
LONG_QUEUE = {
    "STREAMREC_MAX_QUEUE_MS": "600000",
    "STREAMREC_DEFAULT_TIMEOUT_MS": "600000",
    "STREAMREC_DRAIN_TIMEOUT_S": "600",
    "STREAMREC_HUNG_AFTER_S": "600",
    "STREAMREC_MAX_BATCH": "2",
}


class ServiceProcess:
    """A started service. `announced` holds what it printed when it was ready; stderr is kept for messages."""

    def __init__(self, bundle: Path, folder: Path, options: list[str], variables: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMREC_")}
        self.errors = folder / "stderr.txt"
        command = [sys.executable, "-m", "app", "serve", "--bundle", str(bundle), "--port", "0", *options]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a group of its own, to be signalled as a whole
                env=clean | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)  # it has ended

    def wait_until_ready(self) -> ServiceProcess:
        self.announced = [self._next_line(), self._next_line()]
        self.address = next(word.rstrip("/") for word in self.announced[0].split() if word.startswith("http"))
        self.http = httpx.Client(base_url=self.address, timeout=DEADLINE)
        return self

    def _next_line(self) -> str:
        try:
            line = self._lines.get(timeout=DEADLINE)
        except queue.Empty:
            line = None
        assert line is not None, f"not ready: {self.errors.read_text()}"
        return line

    def recommend(self, steps: object = 2, **body: Any) -> dict[str, Any]:
        response = self.http.post("/recommend", params={"reasoning_steps": str(steps)}, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, line_start: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(line_start))

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


StartService = Callable[..., ServiceProcess]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "slow", 2000, sizes=(16, 16, 16), width=1024)


@pytest.fixture(scope="module")
def start_service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Starts a service with options and STREAMREC_ variables; all are gone at the module's end."""
    with ExitStack() as stack:

        def start(
            *options: str, of: Path | None = None, wait: bool = True, variables: dict[str, str] | None = None
        ) -> ServiceProcess:
            service = ServiceProcess(of or bundle, tmp_path_factory.mktemp("service"), list(options), variables or {})
            stack.callback(service.close)
            return service.wait_until_ready() if wait else service

        yield start
