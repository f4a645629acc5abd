"""Make targets install what they need once, and say in one sentence what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=DEADLINE)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of a fresh clone that make reads."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def plan(folder: Path, target: str) -> str:
    done = make(folder, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("target", "lock", "last"),
    [
        ("serve", "serving.lock", "-m app serve --bundle bundles/demo --host 127.0.0.1 --port 8000"),
        ("test", "dev.lock", "-m pytest"),
        ("bench", "dev.lock", "-m benchmarks"),
        ("load", "dev.lock", "-m benchmarks.service.load --bundle bundles/demo --rate 20"),
        ("demo", "dev.lock", "-m training demo"),
        ("install", "dev.lock", "touch .venv/dev.stamp"),
        ("coverage", "dev.lock", "--cov"),
        ("format", "dev.lock", "-m ruff format"),
        ("lint", "dev.lock", "-m ruff format --check"),
        ("lint", "dev.lock", "lint-imports"),
        ("audit", "dev.lock", "requirements/audit.py"),
        ("sbom", "dev.lock", "-m cyclonedx_py requirements"),
    ],
)
def test_a_target_installs_its_lock_before_it_runs(clone: Path, target: str, lock: str, last: str) -> None:
    steps = plan(clone, target)
    installs = f"install --no-deps --require-hashes -r requirements/{lock}"
    torch = "install -r requirements/torch.lock"
    assert steps.index("-m venv .venv") < steps.index(installs) < steps.index(torch) < steps.index(last)


def test_serving_installs_nothing_of_training(clone: Path) -> None:
    assert "dev.lock" not in plan(clone, "serve")


def test_packages_are_installed_once_and_again_when_the_lock_changes(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").touch()
    (clone / ".venv" / "serving.stamp").touch()
    assert "install" not in plan(clone, "serve")
    later = (clone / ".venv" / "serving.stamp").stat().st_mtime + 10
    os.utime(clone / "requirements" / "serving.lock", (later, later))
    assert "-r requirements/serving.lock" in plan(clone, "serve")


def test_a_python_that_is_too_old_ends_in_one_sentence(clone: Path) -> None:
    old = clone / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(clone, "serve", f"BASE_PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (clone / ".venv").exists()


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize(("variables", "suite"), [({}, "test"), ({"COVERAGE": "1"}, "coverage")])
@pytest.mark.parametrize("installs", [True, False])
@pytest.mark.parametrize("user", ["0", "1000"])
def test_ci_installs_missing_programs_and_continues_where_it_cannot(
    tmp_path: Path, installs: bool, user: str, variables: dict[str, str], suite: str
) -> None:
    """The PATH holds stand-ins for apt-get, make and id, and nothing else that the script calls."""
    calls = tmp_path / "calls"
    calls.touch()
    stand_ins = {
        "id": f"echo {user}",
        "apt-get": f'echo "apt-get $1" >> {calls}; exit {int(not installs)}',
        "make": f'echo "make $1" >> {calls}',
    }
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    script = [str(shutil.which("bash")), str(ROOT / ".ci" / "run")]
    done = subprocess.run(script, env={"PATH": str(tmp_path), **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = ["apt-get update", *(["apt-get install"] if installs else [])] if user == "0" else []
    assert calls.read_text().splitlines() == [*asked, "make lint", f"make {suite}"]
    assert ("could not install chromium prometheus" in done.stderr) == (user == "0" and not installs)


def test_a_commit_is_checked_by_what_lint_runs(clone: Path) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = plan(clone, "lint")
    for hook in hooks:
        program = hook["entry"].removesuffix(" --force-exclude").removesuffix(" --check").removesuffix(" check")
        assert program in lint, f"pre-commit runs {program}, make lint does not"
    assert len(hooks) == 4
