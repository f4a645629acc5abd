"""Servers in processes of their own: started on some of the machine's cores, awaited, measured and stopped (Linux)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import ROOT


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `pid`: its first process, and the session of all processes that it has started. `log`: what
    they write to standard output and standard error."""

    address: str
    pid: int
    log: Path

    def log_lines(self) -> int:
        with self.log.open("rb") as file:
            return sum(1 for _ in file)

    def cpu_seconds(self) -> float:
        """User and system time of all its processes that are alive."""
        return sum(cpu for session, cpu in _sessions() if session == self.pid)

    def peak_mb(self) -> float:
        """Peak memory of the first process since the last call."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # resets the peak
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _sessions() -> Iterator[tuple[int, float]]:
    """Session and CPU seconds, all threads, of every process of the machine."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(command: Sequence[str], cores: set[int] | None = None) -> Iterator[Server]:
    """Runs `python COMMAND --port PORT` on a free port and on these cores until the end of the block.

    Raises SystemExit with the server's output where it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as out:
            process = subprocess.Popen(
                pinned([sys.executable, *command, "--port", str(port)], cores),
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a group of its own: some servers leave processes behind
            )
        try:
            address = f"http://127.0.0.1:{port}"
            while not ready(address):
                if process.poll() is not None:
                    raise SystemExit(f"The server did not start:\n{log.read_text()}")
                time.sleep(0.2)
            yield Server(address, process.pid, log)
            process.terminate()
            process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def running_service(bundle: Path, options: Sequence[str] = (), cores: set[int] | None = None) -> Iterator[Server]:
    """Our service with this bundle, at its default log level: a line per request, as in production."""
    with running(["-m", "app", "serve", "--bundle", str(bundle), *options], cores) as server:
        yield server


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def pinned(command: Sequence[str], cores: set[int] | None) -> list[str]:
    """The command, pinned to some of the machine's cores."""
    return list(command) if cores is None else ["taskset", "--cpu-list", ",".join(map(str, sorted(cores))), *command]


def split_cores(text: str) -> tuple[set[int], set[int] | None]:
    """The cores in `0` or `0,1` for the server, and the others for the sender; None (all) where none is left."""
    chosen = {int(core) for core in text.split(",")}
    return chosen, set(range(os.cpu_count() or 1)) - chosen or None
