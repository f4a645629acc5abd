"""Writes serving.lock and dev.lock from pyproject.toml: exact versions, and nothing that holds for one machine only.

torch is written without the local part of its version (2.13.0, not 2.13.0+cpu): each machine takes the build that its
own package source offers, and that build brings the CUDA packages it needs, if it needs any.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
EXTRAS = {"serving.lock": [], "dev.lock": ["--extra", "dev"]}
OF_ONE_MACHINE = re.compile(r"^(nvidia-|cuda-|triton\b)")
HEAD = "# Made by `make lock` from pyproject.toml; change that file, not this one.\n"


def resolve(extras: list[str], constraints: Path) -> list[str]:
    """What the resolver picks within the constraints, as sorted lines `name==version`."""
    options = "--quiet --no-header --no-annotate --strip-extras --allow-unsafe --output-file=- --no-emit-options"
    options += " --no-emit-index-url --no-emit-find-links --no-emit-trusted-host"
    command = [sys.executable, "-m", "piptools", "compile", *options.split(), "--constraint", str(constraints)]
    done = subprocess.run([*command, *extras, "pyproject.toml"], cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("The versions in pyproject.toml do not fit together; the lines above say which.")
    pins = (re.sub(r"^(torch==[\d.]+)\+\w+", r"\1", line) for line in done.stdout.splitlines())
    return sorted(pin for pin in pins if "==" in pin and not OF_ONE_MACHINE.match(pin))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(TORCH + "\n")
        for name, extras in EXTRAS.items():
            pins = resolve(extras, constraints)
            (HERE / name).write_text(HEAD + "\n".join(pins) + "\n")
            # The second file must agree with the first, so that both can be installed into one environment.
            constraints.write_text("\n".join(pins) + "\n")
            print(f"requirements/{name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
