"""The setting that chooses what runs the network: it reaches the engine, and is refused where it cannot be had."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app import logs
from app.__main__ import main
from app.lifecycle import Service
from app.main import create_app
from serving.errors import BundleError
from serving.network.onnx import OnnxRuntime
from serving.online.tiers import MAGIC
from serving.types import StateDtype
from tests.answers import assert_same_answer
from tests.app.conftest import settings
from tests.builders import tiny_bundle
from tests.conftest import RedisServer
from tests.waiting import DEADLINE


def test_the_chosen_runtime_runs_the_network(tmp_path: Path) -> None:
    ready = threading.Event()
    app = create_app(settings(bundle=tiny_bundle(tmp_path / "b"), runtime="onnx"), on_ready=lambda _: ready.set())
    with TestClient(app) as client:
        assert ready.wait(DEADLINE)
        service: Service = app.state.service
        assert isinstance(service.recommender.engine.runtime, OnnxRuntime)  # type: ignore[union-attr]
        answer = client.post("/recommend?reasoning_steps=2", json={"history": ["i1", "i2"], "k": 5}).json()
        assert answer["source"] == "model" and len(answer["items"]) == 5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_answer_is_the_same_from_a_fresh_state_and_from_either_tier(
    dtype: StateDtype, tmp_path: Path, redis_server: RedisServer
) -> None:
    bundle, asked = tiny_bundle(tmp_path / "b"), {"user_id": "u", "history": ["i1", "i2"], "k": 5}
    found = []
    for in_process in (10, 0):  # a second process finds in Redis what the first has put there
        ready = threading.Event()
        chosen = settings(
            bundle=bundle, state_dtype=dtype, memory_cache_users=in_process,
            redis_url=redis_server.url, redis_timeout_ms=2000,
        )  # fmt: skip
        with TestClient(create_app(chosen, on_ready=lambda _, ready=ready: ready.set())) as client:
            assert ready.wait(DEADLINE)
            found += [client.post("/recommend?reasoning_steps=2", json=asked).json() for _ in range(2)]
        with redis_server.client() as redis:
            (key,) = redis.keys("streamrec:states:*")
            assert redis.getrange(key, 0, 3) == MAGIC[dtype]
    assert [answer["cache"] for answer in found] == ["miss", "memory", "redis", "redis"]
    for answer in found:
        assert_same_answer(answer["items"], found[0]["items"])


def test_int8_without_its_gate_keeps_the_service_from_starting(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    chosen = settings(bundle=tiny_bundle(tmp_path / "b"), runtime="onnx-int8")
    with TestClient(create_app(chosen, on_failure=on_failure)) as client:
        assert told.wait(DEADLINE)
        assert isinstance(failures[0], BundleError) and "int8" in str(failures[0])
        assert client.get("/readyz").status_code == 503


def test_an_unknown_runtime_ends_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--runtime", "fast"]) == 2
    message = capsys.readouterr().err
    assert "STREAMREC_RUNTIME" in message and "'onnx-int8'" in message


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_is_taken_ends_in_a_sentence(
    workers: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "set_up", lambda level: None)  # pytest's own stays
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--workers", workers]) == 1
    message = capsys.readouterr().err
    assert port in message and "--port" in message and "Traceback" not in message
