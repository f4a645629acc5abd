"""Several worker processes behind one port, started, watched, replaced and stopped by a process that loads no model.

Workers share the listening socket, and the memory of the bundle's mapped files: weights and trie are in the page cache
once. All write their metrics to one folder, so that any of them can report the sum. A worker that dies is replaced, and
its replacement takes requests once it is ready. Until one worker has been ready, a death stops the service: the next
would fail in the same way. From then on no death stops those that serve; a worker that dies again and again is started
again after growing pauses.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from app.settings import Settings
from app.slot import METRICS_FOLDER, WorkerSlot
from serving.online.watchdog import LOOK_EVERY, Watchdog

log = logging.getLogger("streamrec.workers")

KILL_AFTER_S = 5.0  # beyond the drain timeout; a worker ends itself before (app/server.py)
LONGEST_PAUSE_S = 60.0
HEALTHY_AFTER_S = 60.0  # a worker that lived so long was sound: its replacement starts at once
SAME_SIGNAL_S = 1.0  # timeout(1), shells and wrappers send a signal twice; it is meant once


def pause_before(deaths: int) -> float:
    """Seconds to wait before a replacement is started, after so many early deaths in a row."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE_S, 2.0 ** (deaths - 2))


def supervise(settings: Settings, listening: socket.socket) -> int:
    """Runs `settings.workers` workers until it is stopped. Returns the exit status of the service."""
    with TemporaryDirectory(prefix="streamrec-") as folder:
        os.environ[METRICS_FOLDER] = folder
        return _Supervisor(settings, listening, Path(folder)).run()


@dataclass
class _Place:
    """Where one of the workers runs. deaths: of workers that did not live long, in a row."""

    slot: WorkerSlot
    watchdog: Watchdog
    looked: float = 0.0
    worker: multiprocessing.process.BaseProcess | None = None
    started: float = 0.0
    deaths: int = 0


class _Supervisor:
    def __init__(self, settings: Settings, listening: socket.socket, folder: Path) -> None:
        self._settings, self._listening, self._folder = settings, listening, folder
        # A fork would copy locks held by threads that it does not copy; a fresh process maps the same files anyway.
        self._processes = multiprocessing.get_context("spawn")
        self._places = [
            _Place(WorkerSlot(number, settings.workers, folder), Watchdog(settings.hung_after_s))
            for number in range(settings.workers)
        ]
        self._has_served = False
        self._stopped_at: float | None = None
        self._at_once = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        for place in self._places:
            place.slot.report_state("loading")
        for place in self._places:
            self._start(place)
        failed = False
        while self._stopped_at is None and not failed:
            self._wait()
            for place in self._places:
                if self._stopped_at is None:
                    failed |= not self._look_after(place)
        return 1 if self._end() or failed else 0

    def _stop(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._stopped_at is None:
            self._stopped_at = now
        elif now - self._stopped_at > SAME_SIGNAL_S:
            self._at_once = True

    def _wait(self) -> None:
        """Until a worker ends, or a moment: signals do not interrupt the wait."""
        wait([place.worker.sentinel for place in self._places if place.worker is not None], timeout=0.2)

    def _start(self, place: _Place) -> None:
        if self._stopped_at is not None:
            return
        place.worker = self._processes.Process(
            target=_work, args=(self._settings, self._listening, place.slot), name=f"worker-{place.slot.number}"
        )
        place.started = time.monotonic()
        place.worker.start()

    def _look_after(self, place: _Place) -> bool:
        """Replaces the worker if it has died, after its pause. False if the service cannot serve at all."""
        now = time.monotonic()
        if place.worker is None:
            if now >= place.started + pause_before(place.deaths):
                self._start(place)
            return True
        if place.worker.is_alive():
            if now >= place.looked + LOOK_EVERY:
                place.looked = now
                self._end_if_frozen(place)
            return True
        dead, place.worker = place.worker, None
        _forget(dead)
        self._has_served |= any(state in ("ready", "draining") for state in place.slot.states())
        if not self._has_served:
            return False
        place.deaths = 1 if now - place.started > HEALTHY_AFTER_S else place.deaths + 1
        place.started = now
        place.slot = replace(place.slot, is_replacement=True)
        place.slot.report_state("replaced")
        log.error(
            "worker %d exited with status %s and is replaced in %g s",
            place.slot.number, dead.exitcode, pause_before(place.deaths),
        )  # fmt: skip
        return self._look_after(place)

    def _end_if_frozen(self, place: _Place) -> None:
        """Kills a worker whose event loop has not run for long: it serves nobody, and probes reach the others."""
        seconds = place.watchdog.look(place.slot.last_beat())
        if seconds is not None and place.worker is not None:
            log.error("worker %d has not moved for %.0f s and is killed", place.slot.number, seconds)
            place.worker.kill()

    def _end(self) -> bool:
        """Stops all workers once they have finished their requests. Returns whether any of them failed."""
        workers = [place.worker for place in self._places if place.worker is not None]
        for worker in workers:
            worker.terminate()  # nothing to one that was signalled with the whole group, or has ended
        deadline = time.monotonic() + self._settings.drain_timeout_s + KILL_AFTER_S
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline and not self._at_once:
            wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=0.2)
        for worker in workers:
            worker.kill()
            worker.join()
        # SIGTERM kills a worker that has only begun to load: it had nothing to finish.
        return any(worker.exitcode not in (0, -signal.SIGTERM) for worker in workers)


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
