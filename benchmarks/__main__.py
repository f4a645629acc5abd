"""`python -m benchmarks`: the benchmarks that fit a laptop, one after the other, on the demo's own shop and bundle."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT

SHOP = "runs/demo/shop"
COMMANDS = (
    "-m benchmarks.engine.latency --bundle bundles/demo",
    "-m benchmarks.engine.cache --bundle bundles/demo",
    f"-m benchmarks.accuracy.demo --data {SHOP}",
)


def main() -> int:
    if not (ROOT / SHOP / "truth.json").exists():
        shop = f"-m training data shop --users 4000 --items 1000 --seed 0 --out {SHOP}"
        subprocess.run([sys.executable, *shop.split()], cwd=ROOT, check=True)
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        if code := subprocess.run([sys.executable, *command.split()], cwd=ROOT).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
