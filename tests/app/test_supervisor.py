"""The supervisor's decisions, with pretended workers: who is replaced, when, and what stops the service."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import __main__ as command
from app import logs, supervisor
from app.main import create_app
from app.slot import METRICS_FOLDER, WorkerSlot
from serving.online.watchdog import LOOK_EVERY, Watchdog
from tests.app.conftest import ShapedEngine, settings
from tests.waiting import eventually


class Worker:
    """Stands for a process. It runs until it is told to die."""

    def __init__(self, name: str) -> None:
        self.name, self.pid = name, 1 << 22
        self.exitcode: int | None = None
        self.sentinel, self._write = os.pipe()

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        return self.exitcode is None

    def die(self, status: int) -> None:
        if self.is_alive():
            self.exitcode = status
            os.close(self._write)

    def terminate(self) -> None:
        self.die(0)

    def kill(self) -> None:
        self.die(-9)

    def join(self) -> None:
        os.close(self.sentinel)


class Stage:
    """A supervisor, its workers in the order of their starts, and a clock."""

    def __init__(self, folder: Path, count: int) -> None:
        self.now, self.started = 1000.0, list[Worker]()
        self.supervisor = supervisor.Supervisor(settings(workers=count), socket.socket(), folder, self._make)  # type: ignore[arg-type]
        self.workers = self.supervisor.workers
        self.supervisor.start()

    def _make(self, target: Any, args: Any, name: str) -> Worker:
        self.started.append(Worker(name))
        return self.started[-1]

    def look(self, after: float = 0.0) -> bool:
        """One round of the supervisor's, so many seconds later."""
        self.now += after
        return self.supervisor.step()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv(METRICS_FOLDER, str(tmp_path))
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr(supervisor, "time", clock)
    made = Stage(tmp_path, 2)
    clock.monotonic = lambda: made.now
    return made


def ready(*workers: supervisor.Worker) -> None:
    for worker in workers:
        worker.slot.report_state("ready")


def test_a_replacement_that_is_killed_while_it_warms_stops_nobody(stage: Stage) -> None:
    ready(*stage.workers)
    stage.started[0].die(-9)
    assert stage.look() and [worker.name for worker in stage.started[2:]] == ["worker-0"]
    assert stage.workers[0].slot.is_replacement and stage.workers[0].slot.blocking_state() is None
    stage.started[2].die(-9)
    assert stage.look(after=2) and stage.started[1].is_alive()
    assert stage.look(after=1) and len(stage.started) == 4 and stage.started[3].is_alive()


def test_a_replacement_that_keeps_failing_is_tried_after_growing_pauses(stage: Stage) -> None:
    ready(*stage.workers)
    starts: list[float] = []
    for _ in range(9):
        newest = stage.started[-1]
        (newest if newest.name == "worker-0" else stage.started[0]).die(1)
        begun, died = len(stage.started), stage.now
        while len(stage.started) == begun:
            assert stage.look(after=0.25 if starts else 0)
        starts.append(stage.now - died)
    assert [round(pause) for pause in starts] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    stage.now += supervisor.HEALTHY_AFTER_S + 1
    stage.started[-1].die(1)
    assert stage.look() and stage.started[-1].is_alive(), "one that was sound for long is replaced at once"


def test_one_of_several_that_dies_at_the_start_is_tried_again_once_another_is_ready(stage: Stage) -> None:
    ready(stage.workers[1])
    stage.started[0].die(-9)
    assert stage.look() and stage.started[2].name == "worker-0"


def test_a_worker_that_dies_before_any_was_ready_stops_the_service(stage: Stage) -> None:
    stage.started[1].die(1)
    assert not stage.look()
    assert stage.supervisor.end() is False and stage.started[0].exitcode == 0


def test_both_workers_may_die_once_the_service_has_served(stage: Stage) -> None:
    ready(*stage.workers)
    stage.started[0].die(-9)
    stage.started[1].die(-9)
    assert stage.look() and len(stage.started) == 4
    stage.started[2].die(-9)
    assert stage.look(), "no worker is ready, but some were"


def test_a_signal_sent_twice_at_once_is_one_signal(stage: Stage) -> None:
    for seconds, at_once in ((0.0, False), (0.1, False), (5.0, True)):
        stage.now += seconds
        stage.supervisor.stop(signal.SIGTERM, None)
        assert stage.supervisor.at_once is at_once
    assert stage.supervisor.stopped_at == 1000.0
    begun = len(stage.started)
    stage.workers[0].process = None
    assert stage.look(after=100) and len(stage.started) == begun, "nothing is started any more"


def test_the_first_worker_that_finds_all_ready_announces_it(stage: Stage) -> None:
    assert [worker.slot.is_first_to_announce() for worker in (*stage.workers, stage.workers[0])] == [True, False, False]


def test_a_worker_that_does_not_move_is_killed_and_replaced(stage: Stage) -> None:
    """Stopped, or hung in something that holds the interpreter: its siblings answer the probes."""
    ready(*stage.workers)
    for worker in stage.workers:
        worker.watchdog = Watchdog(30, lambda: stage.now)
    moving, frozen = stage.workers
    for seconds in range(40):
        os.utime(moving.slot._file, ns=(seconds, seconds))
        assert stage.look(after=LOOK_EVERY)
    assert stage.started[1].exitcode == -9 and [worker.name for worker in stage.started[2:]] == ["worker-1"]
    assert stage.started[0].is_alive() and frozen.slot.is_replacement
    for _ in range(100):  # however long the replacement loads
        assert stage.look(after=LOOK_EVERY / 2)
        moving.slot.beat()
    assert len(stage.started) == 3


def test_a_supervisor_that_was_stopped_itself_kills_nobody(stage: Stage) -> None:
    ready(*stage.workers)
    for worker in stage.workers:
        worker.watchdog = Watchdog(30, lambda: stage.now)
    for _ in range(10):
        assert stage.look(after=86_400) and all(worker.is_alive() for worker in stage.started)


def test_a_worker_that_serves_moves(tmp_path: Path, engine: ShapedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.LOOK_EVERY", 0.01)
    slot = WorkerSlot(0, 1, tmp_path)
    slot.report_state("loading")
    assert slot.last_beat() is None
    with TestClient(create_app(settings(), engine, slot=slot)):
        slot.report_state("ready")
        before = slot.last_beat()
        eventually(lambda: slot.last_beat() != before)


# The address


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "a" * 80, "::ffff:203.0.113.1"])
def test_an_address_that_cannot_be_had_is_one_sentence(
    workers: str, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "set_up", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command.main(["serve", "--host", host, "--port", port, "--workers", workers]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"Cannot listen on {host}, port {port} (") and told.count("\n") == 1
    assert told.endswith("); choose another --host or --port.\n")


def test_every_address_is_also_that_of_ipv4() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6: --host :: is NOT tested")
    with command.listen("::", 0) as listening:
        with socket.create_connection(("127.0.0.1", listening.getsockname()[1])):
            listening.accept()[0].close()
