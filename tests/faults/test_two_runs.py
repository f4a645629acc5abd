"""Two commands into one folder: the second ends in one sentence, the first does not notice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from serving.bundle import Bundle
from tests.training.shops import command, write_shop

ROOT = Path(__file__).parents[2]


def test_two_trainings_into_one_folder(tmp_path: Path) -> None:
    data = write_shop(tmp_path / "shop")
    line = [sys.executable, "-m", "training", *command("run", data, tmp_path / "b")]
    first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "b.work/run.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    second = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert first.poll() is None or first.returncode == 0
    if second.returncode == 0:  # it came when the first was done already, and found everything made
        assert first.wait(timeout=1) == 0
    else:
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].startswith("streamrec: Another run is using")
    assert first.wait(timeout=200) == 0
    Bundle.load(tmp_path / "b")
