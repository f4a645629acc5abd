"""The application over a small real engine, driven without sockets."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import __main__ as command
from app import loading, logs
from app.guard import Bounds
from app.main import create_app
from app.settings import Settings
from serving.engine import Engine
from serving.types import Answer, EncoderState, Request
from tests.builders import GATE, tiny_model
from tests.waiting import DEADLINE, eventually


def settings(**values: Any) -> Settings:
    """Defaults and what the test sets; nothing from this machine's environment. Small batches: fewer are measured.
    No request is late and no engine hung unless its test says so, however slow the machine."""
    quiet = {"max_batch": 4, "default_timeout_ms": 600_000, "hung_after_s": 600.0}
    return Settings.model_validate(Settings.model_construct().model_dump() | quiet | values)


def guard_bounds(**changes: float) -> Bounds:
    """What the guard permits: enough for anything, and for ever, but for what the test changes."""
    enough = Bounds(
        head_bytes=32 << 10,
        head_fields=100,
        head_timeout=1e6,
        body_timeout=1e6,
        connections=1000,
        unfinished_bytes=64 << 20,
    )
    return replace(enough, **changes)  # type: ignore[arg-type]


class Gate:
    """Holds every search until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(DEADLINE)


class ShapedEngine:
    """The real engine, with something of the test's in front of every search after the warm-up."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.bundle, self.before = inner, inner.bundle, lambda: None
        self.after: Callable[[list[Answer]], list[Answer]] = lambda answers: answers
        self.refresh, self.with_room, self.adopt = inner.refresh, inner.with_room, inner.adopt
        self.searched: list[list[Request]] = []
        self.encoded = 0

    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]:
        self.encoded += len(histories)
        return self.inner.encode(histories)

    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]:
        self.before()
        self.searched.append(list(requests))
        return self.after(self.inner.search(requests, states))

    def warm_up(self) -> None:
        pass

    @property
    def room(self) -> float:
        return self.inner.room


@pytest.fixture(scope="session", autouse=True)
def quick_start() -> Iterator[None]:
    """One run of each shape is measured at a start instead of several: nearly every test starts a service."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "CALIBRATION_RUNS", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_stay_with_pytest() -> Iterator[None]:
    """The command would take them from the tests that call it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "end_at_once_on_signals", lambda: None)
        yield


@pytest.fixture(scope="session")
def real_engine() -> Engine:
    return Engine(tiny_model(neighbours=True))


@pytest.fixture(scope="session")
def mixed_engine() -> Engine:
    return Engine(tiny_model(neighbours=True, neighbours_weight=1.0, gate=GATE))


@pytest.fixture
def engine(real_engine: Engine) -> ShapedEngine:
    return ShapedEngine(real_engine)


Start = Callable[..., TestClient]


@pytest.fixture
def start(engine: ShapedEngine) -> Iterator[Start]:
    """Starts the application with the given settings, waits until it is ready, stops it after the test."""
    with ExitStack() as stack:

        def begin(wait: bool = True, **values: Any) -> TestClient:
            app = create_app(settings(**values), engine)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            return ready(client) if wait else client

        yield begin


@pytest.fixture(scope="module")
def shared(real_engine: Engine) -> Iterator[TestClient]:
    """One service for a module's many small tests: a start measures the engine, which takes longer than they do."""
    admin = hashlib.sha256(b"admin").hexdigest()
    app = create_app(settings(admin_keys=admin), real_engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield ready(client)


def ready(client: TestClient) -> TestClient:
    """The client, once its service is ready."""
    eventually(lambda: client.get("/readyz").status_code == 200)
    return client


@pytest.fixture
def client(start: Start) -> TestClient:
    return start()


def log_line(record: logging.LogRecord) -> str:
    """What the service writes of a record. To be called where it is logged: only there is the request known."""
    return logs.formatter().format(logs.NeverBlockingHandler().prepare(record))
