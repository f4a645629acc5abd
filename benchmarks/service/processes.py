"""Servers as processes of their own: started on some of the machine's cores, awaited, watched and ended (Linux)."""

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
    """A server that runs. `pid` is its first process, and the session of all it has started."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """User and system time of all its processes that live."""
        return sum(cpu for session, cpu in _sessions() if session == self.pid)

    def peak_mb(self) -> float:
        """The most memory that the first process held since this was asked last."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # forgets the peak
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _sessions() -> Iterator[tuple[int, float]]:
    """Of every process: its session and its CPU seconds, all threads."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(command: Sequence[str], cores: set[int] | None = None) -> Iterator[Server]:
    """Runs `python COMMAND --port PORT` on a free port and on those cores, until after the block; SystemExit with what
    it wrote where it does not become ready."""
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
            yield Server(address, process.pid)
            process.terminate()
            process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def running_service(bundle: Path, options: Sequence[str] = (), cores: set[int] | None = None) -> Iterator[Server]:
    """Our service with this bundle."""
    command = ["-m", "app", "serve", "--bundle", str(bundle), "--log-level", "warning", *options]
    with running(command, cores) as server:
        yield server


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def pinned(command: Sequence[str], cores: set[int] | None) -> list[str]:
    """The command, kept to some of the machine's cores."""
    return list(command) if cores is None else ["taskset", "--cpu-list", ",".join(map(str, sorted(cores))), *command]


def split_cores(text: str) -> tuple[set[int], set[int] | None]:
    """The cores named like `0` or `0,1` for what is measured, and the others for who sends: all where none is left."""
    chosen = {int(core) for core in text.split(",")}
    return chosen, set(range(os.cpu_count() or 1)) - chosen or None
