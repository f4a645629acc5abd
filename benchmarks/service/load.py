"""Starts the service, sends it the traffic of `locustfile.py`, prints the table and draws latency against load.

    python -m benchmarks.service.load --rate 20

Exit status 1 where the steady phase does not pass (p99, share without an answer). Service and sender share this
machine's cores: the figures are those of the pair, and a rate that the sender cannot keep shows in `sent_per_s`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import ROOT, commit, record, table
from benchmarks.service.processes import running_service

COLUMNS = ["phase", "asked_per_s", "sent_per_s", "p50_ms", "p95_ms", "p99_ms", "cached", "rejected", "failed"]
RESULT = "benchmarks/results/load.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.load", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--rate", type=int, default=20, help="requests a second of the steady phase")
    parser.add_argument("--phase-seconds", type=float, default=10)
    parser.add_argument("--p99-ms", type=float, default=250)
    parser.add_argument("--error-share", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path(RESULT), help="JSON; the plot lies beside it as SVG")
    given = parser.parse_args()
    code, began = commit(), time.perf_counter()
    limits = ["--p99-ms", str(given.p99_ms), "--error-share", str(given.error_share)]
    with running_service(given.bundle) as server:
        found = send(server.address, ["--rate", str(given.rate), "--phase-seconds", str(given.phase_seconds), *limits])
    print(table(found["rows"], COLUMNS))
    out, asked = ROOT / given.out, f"--rate {given.rate} --phase-seconds {given.phase_seconds:g}"
    record(
        out,
        f"python -m benchmarks.service.load --bundle {given.bundle} {asked}",
        [0],
        found["rows"],
        minutes=round((time.perf_counter() - began) / 60, 1),
        limits={"p99_ms": given.p99_ms, "error_share": given.error_share},
        failed=found["failed"],
        **code,
    )
    plot(found["rows"], given.p99_ms, out.with_suffix(".svg"))
    print(f"\n{out.with_suffix('.svg').relative_to(ROOT)}: latency against load")
    print("\n".join(f"FAILED {fault}" for fault in found["failed"]) or "passed")
    return 1 if found["failed"] else 0


def send(address: str, options: Sequence[str]) -> dict[str, Any]:
    """Runs locust without its page; what its report holds: rows, failed, answers."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # A process of its own: locust replaces Python's sockets when it is imported.
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            "benchmarks/service/locustfile.py",
            "--host",
            address,
            "--headless",
        ]
        command += ["--only-summary", "--loglevel", "ERROR", "--report", str(report), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        if not report.exists():
            raise SystemExit(f"locust did not come to its end:\n{done.stdout.decode()}{done.stderr.decode()}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def plot(rows: Sequence[dict[str, Any]], limit_ms: float, path: Path) -> None:
    """p50 and p99 against the requests that were sent a second, with the share that was turned away below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "streamrec", "svg.fonttype": "none"}  # the same figures, the same file
    from matplotlib import pyplot, ticker

    shown = sorted((row for row in rows if row["p99_ms"] is not None), key=lambda row: row["sent_per_s"])
    load = [row["sent_per_s"] for row in shown]
    figure, (times, lost) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=[3, 1], layout="constrained"
    )
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        times.plot(load, [row[name] for row in shown], marker="o", label=name.removesuffix("_ms"))
    times.axhline(limit_ms, linestyle=":", color="grey", label=f"limit of p99: {limit_ms:g} ms")
    times.set(yscale="log", ylabel="milliseconds", ylim=(None, 1.3 * limit_ms))
    times.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    times.yaxis.set_minor_locator(ticker.NullLocator())
    figure.suptitle("Latency of one replica against load", fontsize=11)
    times.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    lost.bar(load, [100 * (row["rejected"] + row["failed"]) for row in shown], width=max(load) / 40)
    lost.set(xlabel="requests sent a second (Poisson, open loop)", ylabel="% without\nanswer", ylim=(0, None))
    lost.set_ylim(top=max(1, lost.get_ylim()[1]))
    for axes in (times, lost):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
