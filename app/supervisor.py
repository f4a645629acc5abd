"""Several processes behind one port: started, watched, replaced and stopped by one that loads no model.

They share the listening socket, and the memory of what is mapped from the bundle's files: weights and trie are pages
of the page cache, one copy for all. Each process writes its metrics to one folder, so that whichever answers /metrics
shows the sum. A worker that dies is replaced, and the new one takes requests once it is ready; one that never became
ready stops the whole service, for the next would fare no better.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from app.settings import Settings

log = logging.getLogger("streamrec.workers")

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported
GRACE = 5.0  # seconds beyond the longest drain, after which a worker is killed


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place among all. Their states lie in files of one folder, so that each can tell for all."""

    number: int
    count: int
    folder: Path
    late: bool = False  # it replaces one that died, so it must not take requests before it is ready

    def tell(self, state: str) -> None:
        path = self.folder / f"worker-{self.number}"
        half = path.with_suffix(".part")
        half.write_text(state)
        half.replace(path)

    def states(self) -> list[str]:
        return [(self.folder / f"worker-{number}").read_text() for number in range(self.count)]

    def keeps_back(self) -> str | None:
        """The state of a worker that takes requests and cannot answer them, if there is one. Those being replaced take
        none."""
        return next((state for state in self.states() if state not in ("ready", "replaced")), None)


def supervise(settings: Settings, listening: socket.socket) -> int:
    """Runs `settings.workers` of them until told to stop. Returns the exit status of the service."""
    with TemporaryDirectory(prefix="streamrec-") as folder:
        os.environ[METRICS_FOLDER] = folder
        return _Supervisor(settings, listening, Path(folder)).run()


class _Supervisor:
    def __init__(self, settings: Settings, listening: socket.socket, folder: Path) -> None:
        self._settings, self._listening, self._folder = settings, listening, folder
        # A fork would copy locks of threads that it does not copy; a fresh process maps the same files.
        self._processes = multiprocessing.get_context("spawn")
        self._workers: dict[int, multiprocessing.process.BaseProcess] = {}
        self._stopping = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        seats = [self._seat(number) for number in range(self._settings.workers)]
        for seat in seats:
            seat.tell("loading")
        for seat in seats:
            self._start(seat)
        failed = False
        while not self._stopping and not failed:
            wait([worker.sentinel for worker in self._workers.values()], timeout=0.2)  # signals do not end it
            for number, worker in list(self._workers.items()):
                if not self._stopping and not worker.is_alive():
                    failed |= not self._replace(number, worker)
        return 1 if self._end() or failed else 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _seat(self, number: int, late: bool = False) -> Seat:
        return Seat(number, self._settings.workers, self._folder, late)

    def _start(self, seat: Seat) -> None:
        worker = self._processes.Process(
            target=_work, args=(self._settings, self._listening, seat), name=f"worker-{seat.number}"
        )
        worker.start()
        self._workers[seat.number] = worker

    def _replace(self, number: int, dead: multiprocessing.process.BaseProcess) -> bool:
        """Whether it makes sense to go on: a worker that was ready once may be ready again."""
        _forget(dead)
        seat = self._seat(number, late=True)
        if seat.states()[number] not in ("ready", "draining"):
            return False
        log.error("worker %d ended with status %s; another takes its place", number, dead.exitcode)
        seat.tell("replaced")
        self._start(seat)
        return True

    def _end(self) -> bool:
        """Lets all workers finish what they run. Whether any of them did not end well."""
        for worker in self._workers.values():
            if worker.is_alive():
                worker.terminate()
        deadline = time.monotonic() + self._settings.drain_timeout_s + GRACE
        for worker in self._workers.values():
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        # One that had only begun to load dies of the signal: it had nothing to finish.
        return any(worker.exitcode not in (0, -signal.SIGTERM) for worker in self._workers.values())


def _work(settings: Settings, listening: socket.socket, seat: Seat) -> None:
    """A worker, in its own process."""
    from app.server import serve  # imports torch, and prometheus_client behind the folder's name

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # nobody else would end it

    threading.Thread(target=follow, name="supervisor", daemon=True).start()
    raise SystemExit(serve(settings, listening, seat))


def _forget(dead: multiprocessing.process.BaseProcess) -> None:
    """Drops what only a live process has, like its queue's depth; what it counted still counts."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(dead.pid)
