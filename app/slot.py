"""One worker's slot among several: its number, and the state that it reports to all the others.

Imports nothing heavy, and not prometheus_client: that reads METRICS_FOLDER when it is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from serving.files import atomic_write

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable through which workers share their metrics
SAME_SIGNAL_S = 1.0  # timeout(1), shells and wrappers send a signal twice; it is meant once


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The states of all workers are files in one folder, so that any worker can report readiness for the whole service.

    is_replacement: this worker replaces one that died, so it must not accept requests before it is ready.
    """

    number: int
    count: int
    folder: Path
    is_replacement: bool = False

    def report_state(self, state: str) -> None:
        with atomic_write(self._file) as partial:
            partial.write_text(state)

    def beat(self) -> None:
        """Shows the supervisor that this worker's event loop runs."""
        os.utime(self._file)

    def last_beat(self) -> int | None:
        """Another number after every beat; None while the worker is not ready."""
        return self._file.stat().st_mtime_ns if self._file.read_text() == "ready" else None

    @property
    def _file(self) -> Path:
        return self.folder / f"worker-{self.number}"

    def states(self) -> list[str]:
        return [(self.folder / f"worker-{number}").read_text() for number in range(self.count)]

    def blocking_state(self) -> str | None:
        """The state of a worker that accepts requests but cannot answer them yet, if there is one.

        A worker that is being replaced accepts none, so it blocks nothing."""
        return next((state for state in self.states() if state not in ("ready", "replaced")), None)

    def is_first_to_announce(self) -> bool:
        """True for one call by one worker: the first."""
        try:
            (self.folder / "announced").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
