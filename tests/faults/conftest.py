"""Load that counts what it lost, and a disk of our own to fill."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServiceProcess, bundle, start_service
from tests.waiting import DEADLINE, eventually

__all__ = ["bundle", "start_service"]  # fixtures
HISTORY = ["i1", "i2", "i3"]


@dataclass
class Load:
    """Clients that ask without pause; each repeats a request that got no answer until it gets one.

    items: of the answers. by_plan: the same by version, reasoning steps and beam width, which follow from the load.
    failed: attempts that ended in an error, by what it was. cache_ms: what each answer says of its time in the cache.
    """

    service: ServiceProcess
    answered: int = 0
    items: set[tuple[str, ...]] = field(default_factory=set)
    by_plan: defaultdict[tuple[str, int, int], set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))
    failed: list[str] = field(default_factory=list)
    cache_ms: list[float] = field(default_factory=list)
    unanswered: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        body = {"user_id": f"client-{number}", "history": HISTORY, "k": 5, "timeout_ms": 120_000}
        client = httpx.Client(base_url=self.service.address, timeout=DEADLINE)
        while not self.stop.is_set():
            self.unanswered += 1
            begin = time.monotonic()
            while True:
                try:
                    response = client.post("/recommend", json=body)
                    if response.status_code == 200:
                        break
                    self.failed.append(str(response.status_code))
                except httpx.HTTPError as error:
                    self.failed.append(type(error).__name__)
                    client.close()
                    client = httpx.Client(base_url=self.service.address, timeout=DEADLINE)
                if time.monotonic() - begin > DEADLINE:
                    return
                time.sleep(0.05)
            self.unanswered -= 1
            self.answered += 1
            answer = response.json()
            items = tuple(item["item_id"] for item in answer["items"])
            self.cache_ms.append(answer["timings_ms"]["cache"])
            self.items.add(items)
            plan = answer["model_version"], answer["reasoning_steps"], answer["beam_width"]
            self.by_plan[plan].add(items)
        client.close()

    def more(self, count: int) -> None:
        """Waits for so many answers more."""
        before = self.answered
        eventually(lambda: self.answered >= before + count)


@contextmanager
def load(service: ServiceProcess, clients: int = 4) -> Iterator[Load]:
    made = Load(service)
    threads = [threading.Thread(target=made.ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        made.more(20)
        yield made
    finally:
        made.stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads)


@dataclass(frozen=True)
class SmallDisk:
    """A disk in memory, mounted where this process alone sees it. Commands run there one after the other."""

    folder: Path

    def run(self, *steps: str | list[str]) -> list[subprocess.CompletedProcess[str]]:
        """steps: commands to run, and sizes such as "200k" that the disk takes before the next one."""
        shell = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh"],
            stdin=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert shell.stdin is not None
        done, mounted = [], False
        for number, step in enumerate(steps):
            if isinstance(step, str):
                option = "remount," if mounted else ""
                shell.stdin.write(f"mount -t tmpfs -o {option}size={step} tmpfs '{self.folder}'\n")
                mounted = True
                continue
            names = [self.folder.with_name(f"{number}.{kind}") for kind in ("out", "err", "code")]
            shell.stdin.write(f"{shlex.join(step)} > '{names[0]}' 2> '{names[1]}'; echo $? > '{names[2]}'\n")
            done.append((step, names))
        shell.stdin.close()
        assert shell.wait(timeout=DEADLINE) == 0
        return [
            subprocess.CompletedProcess(step, int(code.read_text()), out.read_text(), err.read_text())
            for step, (out, err, code) in done
        ]


@pytest.fixture
def small_disk(tmp_path: Path) -> SmallDisk:
    folder = tmp_path / "disk"
    folder.mkdir()
    trial: Any = None
    if shutil.which("unshare"):
        trial = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)],
            capture_output=True,
        )
    if trial is None or trial.returncode:
        # A permission, which no package brings: skipped in CI too.
        pytest.skip("a disk that can be filled needs `unshare --user --mount`, which this machine does not permit")
    return SmallDisk(folder)
