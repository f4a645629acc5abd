"""Looks the locked versions up among the known vulnerabilities (`make audit`), and never calls unchecked what is clean.

pip-audit does the work. By itself it ends in a traceback where its database cannot be reached, and reports "no known
vulnerabilities" where the package source answers without saying anything about them, as mirrors do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCKS = ["dev.lock", "torch.lock"]  # dev.lock contains serving.lock


def ask() -> list[dict[str, Any]] | None:
    """What the database says of each package, as pip-audit writes it; None where it cannot be reached."""
    text = "\n".join((HERE / lock).read_text() for lock in LOCKS)
    pins = re.findall(r"^[a-z0-9-]+==[\w.]+", text, re.MULTILINE)  # without hashes: of torch there are none
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command += ["--format=json", "--requirement", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout and "ConnectionError" not in done.stderr and "ProxyError" not in done.stderr:
        raise SystemExit(f"pip-audit failed: {done.stderr.strip()}")
    return json.loads(done.stdout)["dependencies"] if done.stdout else None


def judge(packages: list[dict[str, Any]] | None, ci: bool) -> tuple[list[str], int]:
    """Lines to print and the exit status: 1 for a known vulnerability, and under CI for packages not checked."""
    if packages is None:
        return ["NOT audited: the database of vulnerabilities cannot be reached; repeat this with a network."], int(ci)
    lines = [
        f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'none'}"
        for package in packages
        for one in package.get("vulns", [])
    ]
    known = len(lines)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        said = f"NOT audited: {len(skipped)} of {len(packages)} packages; the database said nothing of: "
        lines.append(said + (", ".join(skipped) if len(skipped) < len(packages) else "any"))
    lines.append(f"{len(packages) - len(skipped)} packages audited, {known} known vulnerabilities")
    return lines, int(known > 0 or (ci and bool(skipped)))


if __name__ == "__main__":
    lines, status = judge(ask(), os.environ.get("CI") == "true")
    print("\n".join(lines))
    raise SystemExit(status)
