"""The audit never calls clean what it did not check, and the SBOM lists what the image installs, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
UNREACHABLE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # nothing listens there

spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
assert spec and spec.loader
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

CLEAN = {"name": "anyio", "version": "4.16.0", "vulns": []}
HIT = {"name": "flask", "version": "0.5", "vulns": [{"id": "PYSEC-2019-179", "fix_versions": ["1.0"], "aliases": []}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("packages", "said", "status", "status_in_ci"),
    [
        ([CLEAN], "1 packages audited, 0 known", 0, 0),
        ([CLEAN, HIT], "flask 0.5: PYSEC-2019-179, mended in 1.0", 1, 1),
        ([CLEAN, UNKNOWN], "NOT audited: 1 of 2 packages; the database said nothing of: torch", 0, 1),
        ([UNKNOWN], "NOT audited: 1 of 1 packages; the database said nothing of: any", 0, 1),
        ([HIT, UNKNOWN], "1 packages audited, 1 known", 1, 1),
        (None, "NOT audited: the database of vulnerabilities cannot be reached", 0, 1),
    ],
)
def test_only_what_was_checked_is_clean(
    packages: list[dict[str, Any]] | None, said: str, status: int, status_in_ci: int
) -> None:
    for ci, expected in ((False, status), (True, status_in_ci)):
        lines, found = audit.judge(packages, ci)
        assert said in "\n".join(lines)
        assert found == expected


def test_without_a_network_the_audit_says_so_in_one_sentence() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | UNREACHABLE
    command = [sys.executable, str(ROOT / "requirements" / "audit.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NOT audited: the database of vulnerabilities cannot be reached")
    assert "Traceback" not in done.stdout + done.stderr


def test_the_sbom_lists_what_the_image_installs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sbom.json"
    recipe = ["make", "--dry-run", "--silent", "sbom", f"PYTHON={sys.executable}", f"SBOM={out}"]
    steps = subprocess.run(recipe, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE).stdout
    steps = steps[steps.index("mkdir -p") :]  # without what installs the packages, where they are due
    done = subprocess.run(
        steps, shell=True, cwd=ROOT, env=os.environ | UNREACHABLE, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    found = {part["purl"]: part for part in json.loads(out.read_text())["components"]}
    locks = "".join((ROOT / "requirements" / name).read_text() for name in ("serving.lock", "torch.lock"))
    pins = re.findall(r"^([a-z0-9.-]+)==([\w.]+)", locks, re.MULTILINE)
    assert {f"pkg:pypi/{name}@{version}" for name, version in pins} == found.keys()
    hashes = {name: "hashes" in str(part) for name, part in found.items()}
    assert [name for name, has in hashes.items() if not has] == ["pkg:pypi/torch@2.13.0"]
