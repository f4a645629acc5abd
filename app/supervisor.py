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
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from app.settings import Settings
from app.slot import METRICS_FOLDER, WorkerSlot

log = logging.getLogger("streamrec.workers")

GRACE = 5.0  # seconds beyond the longest drain, after which a worker is killed


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
        slots = [self._slot(number) for number in range(self._settings.workers)]
        for slot in slots:
            slot.report_state("loading")
        for slot in slots:
            self._start(slot)
        failed = False
        while not self._stopping and not failed:
            wait([worker.sentinel for worker in self._workers.values()], timeout=0.2)  # signals do not end it
            for number, worker in list(self._workers.items()):
                if not self._stopping and not worker.is_alive():
                    failed |= not self._replace(number, worker)
        return 1 if self._end() or failed else 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _slot(self, number: int, is_replacement: bool = False) -> WorkerSlot:
        return WorkerSlot(number, self._settings.workers, self._folder, is_replacement)

    def _start(self, slot: WorkerSlot) -> None:
        worker = self._processes.Process(
            target=_work, args=(self._settings, self._listening, slot), name=f"worker-{slot.number}"
        )
        worker.start()
        self._workers[slot.number] = worker

    def _replace(self, number: int, dead: multiprocessing.process.BaseProcess) -> bool:
        """Whether it makes sense to go on: a worker that was ready once may be ready again."""
        _forget(dead)
        slot = self._slot(number, is_replacement=True)
        if slot.states()[number] not in ("ready", "draining"):
            return False
        log.error("worker %d ended with status %s; another takes its place", number, dead.exitcode)
        slot.report_state("replaced")
        self._start(slot)
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


def _work(settings: Settings, listening: socket.socket, slot: WorkerSlot) -> None:
    """A worker, in its own process."""
    from app.server import serve  # imports torch, and prometheus_client behind the folder's name

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # nobody else would end it

    threading.Thread(target=follow, name="supervisor", daemon=True).start()
    raise SystemExit(serve(settings, listening, slot))


def _forget(dead: multiprocessing.process.BaseProcess) -> None:
    """Drops what only a live process has, like its queue's depth; what it counted still counts."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(dead.pid)
