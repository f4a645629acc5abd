"""Two commands into one folder: the second ends in one sentence, the first does not notice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from serving.bundle import Bundle
from tests.training.shops import command, write_shop
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]


def test_two_trainings_into_one_folder(tmp_path: Path) -> None:
    data = write_shop(tmp_path / "shop")
    line = [sys.executable, "-m", "training", *command("run", data, tmp_path / "b")]
    first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = tmp_path / "b.work/run.json"
    eventually(lambda: started.exists() or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second comes
    assert first.poll() is None
    second = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith("streamrec: Another run is using")
    first.send_signal(signal.SIGCONT)
    assert first.wait(DEADLINE) == 0
    Bundle.load(tmp_path / "b")
