"""How a process ends, with a service that is only pretended; the real ends are in tests/e2e."""

from __future__ import annotations

import asyncio
import resource
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from app import server
from app.guard import Connections
from app.server import Server, bounds
from tests.app.conftest import guard_bounds, settings
from tests.app.test_security import digest
from tests.builders import tiny_model
from tests.waiting import DEADLINE, eventually_async


class Ended(BaseException):
    pass


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending the process is an exception with its status, and nothing waits."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(server, "os", SimpleNamespace(_exit=end))
    monkeypatch.setattr(server, "end_within", lambda seconds: None)


def make(status: str, slot: Any = None) -> Server:
    drained = asyncio.Event()

    async def drain() -> None:
        await drained.wait()

    service = SimpleNamespace(
        status=status, drain=drain, drained=drained, begin_drain=lambda: None, drain_time_left=0.0, settings=settings()
    )
    return Server(uvicorn.Config(make), service, Connections(guard_bounds()), slot)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "header"), [("", ""), (digest("secret"), " -H 'X-API-Key: YOUR-KEY'")])
def test_the_ready_made_request_has_room_for_a_key_where_keys_are_set(
    capsys: pytest.CaptureFixture[str], keys: str, header: str
) -> None:
    service = SimpleNamespace(settings=settings(api_keys=keys), bundle=tiny_model())
    listening = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 8000))
    server._announce(service, listening, None)  # type: ignore[arg-type]
    url = "http://127.0.0.1:8000/recommend?reasoning_steps=4"
    assert f"curl -s '{url}' -H 'Content-Type: application/json'{header} -d " in capsys.readouterr().out


@pytest.mark.parametrize("status", ["loading", "warming", "replaying"])
def test_while_loading_the_process_ends_at_once(status: str) -> None:
    async def begin() -> None:
        make(status)._begin_drain()

    with pytest.raises(Ended, match="^0$"):
        asyncio.run(begin())


def test_a_signal_sent_twice_at_once_lets_requests_finish_and_a_later_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stop() -> None:
        now = 1000.0
        monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now))
        stopping = make("ready")
        stopping.handle_exit(signal.SIGTERM, None)
        stopping.handle_exit(signal.SIGTERM, None)
        await eventually_async(lambda: stopping.connections.draining)
        assert not stopping.should_exit and not stopping.force_exit
        now += 2
        stopping.handle_exit(signal.SIGINT, None)
        assert stopping.should_exit and stopping.force_exit

    asyncio.run(asyncio.wait_for(stop(), DEADLINE))


def test_a_worker_drains_once_however_often_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop() -> None:
        now = 1000.0
        monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now))
        states: list[str] = []
        worker = make("ready", SimpleNamespace(report_state=states.append))
        worker.handle_exit(signal.SIGINT, None)
        assert worker.stopping_since is None, "Ctrl-C is the supervisor's"
        worker.handle_exit(signal.SIGTERM, None)
        await eventually_async(lambda: states == ["draining"])
        now += 100
        worker.handle_exit(signal.SIGTERM, None)
        assert not worker.should_exit
        worker.service.drained.set()  # type: ignore[attr-defined]
        await eventually_async(lambda: worker.should_exit)
        assert not worker.force_exit

    asyncio.run(asyncio.wait_for(stop(), DEADLINE))


def test_connections_never_take_the_last_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, connections in ((256, 128), (100, 1), (100_000, 4000), (resource.RLIM_INFINITY, 4000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert bounds(settings()).connections == connections


@pytest.mark.parametrize(
    ("most", "raised", "connections"), [(None, 4128, 4000), (10_000, 4128, 4000), (2128, 2128, 2000)]
)
def test_the_limit_of_open_files_is_raised_as_far_as_connections_need_it(
    monkeypatch: pytest.MonkeyPatch, most: int | None, raised: int, connections: int
) -> None:
    most, changed = resource.RLIM_INFINITY if most is None else most, []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, most))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    assert bounds(settings()).connections == connections
    assert changed == [(raised, most)]
