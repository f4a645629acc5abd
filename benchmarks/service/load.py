"""Starts the service, sends it the traffic of `locustfile.py` and prints a table of latency by load.

    python -m benchmarks.service.load --rate 20

Exit status 1 where the steady phase does not pass: its p99, or its share of requests without an answer. Service and
sender share this machine's cores, so the figures are those of the pair; where the sender cannot keep up with a rate,
`sent_per_s` shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import ticker

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.plots import drawing
from benchmarks.service.processes import running_service

COLUMNS = ["phase", "offered_per_s", "sent_per_s", "p50_ms", "p95_ms", "p99_ms", "cached", "rejected", "failed"]


def main() -> int:
    parser = argument_parser("benchmarks.service.load", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--rate", type=int, default=20, help="requests a second of the steady phase (%(default)s)")
    parser.add_argument("--phase-seconds", type=float, default=10)
    parser.add_argument("--p99-ms", type=float, default=250, help="longest p99 of the steady phase that passes")
    parser.add_argument("--error-share", type=float, default=0.01, help="largest share without an answer that passes")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/load.json")
    options = parser.parse_args()
    run = Run(parser, options)
    traffic = ["--rate", str(options.rate), "--phase-seconds", str(options.phase_seconds)]
    limits = ["--p99-ms", str(options.p99_ms), "--error-share", str(options.error_share)]
    with running_service(options.bundle) as server:
        report = send(server.address, [*traffic, *limits])
    print(table(report["rows"], COLUMNS))
    run.record(options.out, [0], report["rows"], failed=report["failed"], limits={"p99_ms": options.p99_ms})
    print("\n".join(f"FAILED {fault}" for fault in report["failed"]) or "passed")
    return 1 if report["failed"] else 0


def send(address: str, options: Sequence[str]) -> dict[str, Any]:
    """Runs locust without its page, and returns its report: rows, failed, answers."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # A process of its own: locust replaces Python's sockets when it is imported.
        command = [sys.executable, "-m", "locust", "-f", "benchmarks/service/locustfile.py", "--host", address]
        command += ["--headless", "--only-summary", "--loglevel", "ERROR", "--report", str(report), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        if not report.exists():
            raise SystemExit(f"locust wrote no report:\n{done.stdout.decode()}{done.stderr.decode()}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def plot(result: dict[str, Any], path: Path) -> None:
    """p50, p95 and p99 against the requests sent a second, with the share that got no answer below."""
    limit_ms = result["limits"]["p99_ms"]
    shown = sorted((row for row in result["rows"] if row["p99_ms"] is not None), key=lambda row: row["sent_per_s"])
    load = [row["sent_per_s"] for row in shown]
    with drawing(path, 7, 5) as figure:
        times, lost = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            times.plot(load, [row[name] for row in shown], marker="o", label=name.removesuffix("_ms"))
        times.axhline(limit_ms, linestyle=":", color="grey", label=f"limit of p99: {limit_ms:g} ms")
        times.set(yscale="log", ylabel="milliseconds", ylim=(None, 1.3 * limit_ms))
        times.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        times.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        times.yaxis.set_minor_locator(ticker.NullLocator())
        times.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
        figure.suptitle("Latency of one replica against load", fontsize=11)
        lost.bar(load, [100 * (row["rejected"] + row["failed"]) for row in shown], width=max(load) / 40)
        lost.set(xlabel="requests sent a second (Poisson, open loop)", ylabel="% without\nanswer", ylim=(0, None))
        lost.set_ylim(top=max(1, lost.get_ylim()[1]))
        for axes in (times, lost):
            axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
