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
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from app.settings import Settings
from app.slot import METRICS_FOLDER, SAME_SIGNAL_S, WorkerSlot
from serving.online.watchdog import LOOK_EVERY, Watchdog

log = logging.getLogger("streamrec.workers")

KILL_AFTER_S = 5.0  # beyond the drain timeout; a worker ends itself before (app/server.py)
LONGEST_PAUSE_S = 60.0
HEALTHY_AFTER_S = 60.0  # a worker that lived so long was sound: its replacement starts at once
# A fork would copy locks held by threads that it does not copy; a fresh process maps the same files anyway.
FreshProcess = multiprocessing.get_context("spawn").Process


def pause_before(deaths: int) -> float:
    """Seconds to wait before a replacement is started, after so many early deaths in a row."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE_S, 2.0 ** (deaths - 2))


def supervise(settings: Settings, listening: socket.socket) -> int:
    """Runs `settings.workers` workers until it is stopped. Returns the exit status of the service."""
    with TemporaryDirectory(prefix="streamrec-") as folder:
        os.environ[METRICS_FOLDER] = folder
        return Supervisor(settings, listening, Path(folder)).run()


@dataclass
class Worker:
    """One of the workers: its process, None while none runs, and what outlives it. deaths: early ones, in a row."""

    slot: WorkerSlot
    watchdog: Watchdog
    looked: float = 0.0
    process: BaseProcess | None = None
    started: float = 0.0
    deaths: int = 0


class Supervisor:
    """stopped_at: when it was told to stop. at_once: told so again, not to wait for requests."""

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        folder: Path,
        make_process: Callable[..., BaseProcess] = FreshProcess,
    ) -> None:
        self._settings, self._listening, self._make_process = settings, listening, make_process
        self.workers = [
            Worker(WorkerSlot(number, settings.workers, folder), Watchdog(settings.hung_after_s))
            for number in range(settings.workers)
        ]
        self._has_served = False
        self.stopped_at: float | None = None
        self.at_once = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        self.start()
        can_serve = True
        while self.stopped_at is None and can_serve:
            self._wait()
            can_serve = self.step()
        return 1 if self.end() or not can_serve else 0

    def start(self) -> None:
        for worker in self.workers:
            worker.slot.report_state("loading")
        for worker in self.workers:
            self._start(worker)

    def step(self) -> bool:
        """Looks after each worker, unless told to stop. False if the service cannot serve at all."""
        return all(self._look_after(worker) for worker in self.workers if self.stopped_at is None)

    def stop(self, number: int, frame: object) -> None:
        """Handles a signal to stop."""
        now = time.monotonic()
        if self.stopped_at is None:
            self.stopped_at = now
        elif now - self.stopped_at > SAME_SIGNAL_S:
            self.at_once = True

    def _wait(self) -> None:
        """Until a worker ends, or a moment: signals do not interrupt the wait."""
        wait([worker.process.sentinel for worker in self.workers if worker.process is not None], timeout=0.2)

    def _start(self, worker: Worker) -> None:
        if self.stopped_at is not None:
            return
        worker.process = self._make_process(
            target=_work, args=(self._settings, self._listening, worker.slot), name=f"worker-{worker.slot.number}"
        )
        worker.started = time.monotonic()
        worker.process.start()

    def _look_after(self, worker: Worker) -> bool:
        """Replaces the worker if it has died, after its pause. False if the service cannot serve at all."""
        now = time.monotonic()
        if worker.process is None:
            if now >= worker.started + pause_before(worker.deaths):
                self._start(worker)
            return True
        if worker.process.is_alive():
            if now >= worker.looked + LOOK_EVERY:
                worker.looked = now
                self._end_if_frozen(worker)
            return True
        dead, worker.process = worker.process, None
        _forget(dead)
        self._has_served |= any(state in ("ready", "draining") for state in worker.slot.states())
        if not self._has_served:
            return False
        worker.deaths = 1 if now - worker.started > HEALTHY_AFTER_S else worker.deaths + 1
        worker.started = now
        worker.slot = replace(worker.slot, is_replacement=True)
        worker.slot.report_state("replaced")
        log.error(
            "worker %d exited with status %s and is replaced in %g s",
            worker.slot.number, dead.exitcode, pause_before(worker.deaths),
        )  # fmt: skip
        return self._look_after(worker)

    def _end_if_frozen(self, worker: Worker) -> None:
        """Kills a worker whose event loop has not run for long: it serves nobody, and probes reach the others."""
        seconds = worker.watchdog.look(worker.slot.last_beat())
        if seconds is not None and worker.process is not None:
            log.error("worker %d has not responded for %.0f s and is killed", worker.slot.number, seconds)
            worker.process.kill()

    def end(self) -> bool:
        """Stops all workers once they have finished their requests. Returns whether any of them failed."""
        processes = [worker.process for worker in self.workers if worker.process is not None]
        for process in processes:
            process.terminate()  # nothing to one that was signalled with the whole group, or has ended
        deadline = time.monotonic() + self._settings.drain_timeout_s + KILL_AFTER_S
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline and not self.at_once:
            wait([process.sentinel for process in processes if process.is_alive()], timeout=0.2)
        for process in processes:
            process.kill()
            process.join()
        # SIGTERM kills a worker that has only begun to load: it had nothing to finish.
        return any(process.exitcode not in (0, -signal.SIGTERM) for process in processes)


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


def _forget(dead: BaseProcess) -> None:
    """Drops the gauges of a dead process, like its queue depth. Its counters stay in the sum."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(dead.pid)  # type: ignore[no-untyped-call]
