"""`python -m benchmarks`: the benchmarks that fit a laptop, one after the other, on the demo's own shop and bundle."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT

COMMANDS = (
    "-m benchmarks.engine.latency --bundle bundles/demo",
    "-m benchmarks.engine.cache --bundle bundles/demo",
    "-m benchmarks.accuracy.demo --bundle bundles/demo",
)


def main() -> int:
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        if code := subprocess.run([sys.executable, *command.split()], cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
