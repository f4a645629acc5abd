"""Several worker processes behind one port, started, watched, replaced and stopped by a process that loads no model.

Workers share the listening socket, and the memory of the bundle's mapped files: weights and trie are in the page cache
once. All write their metrics to one folder, so that any of them can report the sum. A worker that dies is replaced, and
its replacement takes requests once it is ready. A worker that dies before it was ever ready stops the service: the next
would fail in the same way.
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

KILL_AFTER_S = 5.0  # beyond the drain timeout


def supervise(settings: Settings, listening: socket.socket) -> int:
    """Runs `settings.workers` workers until it is stopped. Returns the exit status of the service."""
    with TemporaryDirectory(prefix="streamrec-") as folder:
        os.environ[METRICS_FOLDER] = folder
        return _Supervisor(settings, listening, Path(folder)).run()


class _Supervisor:
    def __init__(self, settings: Settings, listening: socket.socket, folder: Path) -> None:
        self._settings, self._listening, self._folder = settings, listening, folder
        # A fork would copy locks held by threads that it does not copy; a fresh process maps the same files anyway.
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
            wait(
                [worker.sentinel for worker in self._workers.values()], timeout=0.2
            )  # signals do not interrupt the wait
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
        """Starts a replacement. False if the worker was never ready: another would fail in the same way."""
        _forget(dead)
        slot = self._slot(number, is_replacement=True)
        if slot.states()[number] not in ("ready", "draining"):
            return False
        log.error("worker %d exited with status %s and is being replaced", number, dead.exitcode)
        slot.report_state("replaced")
        self._start(slot)
        return True

    def _end(self) -> bool:
        """Stops all workers once they have finished their requests. Returns whether any of them failed."""
        for worker in self._workers.values():
            if worker.is_alive():
                worker.terminate()
        deadline = time.monotonic() + self._settings.drain_timeout_s + KILL_AFTER_S
        for worker in self._workers.values():
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        # SIGTERM kills a worker that has only begun to load: it had nothing to finish.
        return any(worker.exitcode not in (0, -signal.SIGTERM) for worker in self._workers.values())


def _work(settings: Settings, listening: socket.socket, slot: WorkerSlot) -> None:
    """The main function of a worker process."""
    from app.server import serve  # imports torch, and prometheus_client, which reads METRICS_FOLDER

    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # nothing else would stop this process

    threading.Thread(target=stop_with_parent, name="supervisor", daemon=True).start()
    raise SystemExit(serve(settings, listening, slot))


def _forget(dead: multiprocessing.process.BaseProcess) -> None:
    """Drops the gauges of a dead process, like its queue depth. Its counters stay in the sum."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(dead.pid)  # type: ignore[no-untyped-call]
