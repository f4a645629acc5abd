"""`pip install . --no-deps` works without a network, and carries what the packages need beside their code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "benchmarks", "serving", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel that is built from a copy, so that the checkout stays clean."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", out, copy], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("streamrec-*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_all_code_and_data_files_are_in_it(wheel: set[str]) -> None:
    results = ROOT / "benchmarks" / "results"
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and results not in path.parents and path.suffix != ".md"
    }
    assert there <= wheel, f"left out of the wheel: {sorted(there - wheel)}"


def test_nothing_else_is_in_it(wheel: set[str]) -> None:
    strangers = {name for name in wheel if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name}
    assert not strangers
    assert any(name.endswith("/LICENSE") for name in wheel)
