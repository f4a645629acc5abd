"""The Dockerfile: passes hadolint, copies files that exist and reach the builder, and does not run as root."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tools import require
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_no_fault() -> None:
    neighbour = Path(sys.executable).with_name("hadolint")
    program = require(
        str(neighbour) if neighbour.exists() else shutil.which("hadolint"),
        "the Dockerfile is",
        "install hadolint; requirements/tools.lock has it",
    )
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", TEXT, re.MULTILINE)
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), f"{source} is copied into the image, but does not exist"
        assert any(f"{source}/".startswith(f"{path}/") for path in kept), f".dockerignore keeps {source} out"


def test_every_target_exists() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", TEXT, re.MULTILINE)
    assert stages[-1] == "cpu", "a plain `docker build .` makes the last stage"
    assert "gpu" in stages


def test_the_user_is_a_number_and_the_one_of_the_chart() -> None:
    user = re.search(r"^USER (\d+):(\d+)$", TEXT, re.MULTILINE)
    assert user and user[1] != "0"
    deployment = (ROOT / "helm" / "streamrec" / "templates" / "deployment.yaml").read_text()
    assert f"runAsUser: {user[1]}" in deployment
    assert f"runAsGroup: {user[2]}" in deployment


def test_every_package_is_checked_against_its_hash_and_torch_taken_from_one_index() -> None:
    installs = re.findall(r"pip install ([^\n]*)", TEXT)
    assert [line.split()[-1] for line in installs] == ["/tmp/serving.lock", "/tmp/torch.lock", "/tmp/torch.lock"]
    assert all("--require-hashes" in line for line in installs if "serving.lock" in line)
    assert not any("extra-index-url" in line for line in installs), "the newer of two indexes' files would win"
