"""What all benchmarks share: the parser, the record of a run with its machine and commit, and tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.files import atomic_write

ROOT = Path(__file__).parents[1]
MEASURED_CODE = ("app", "training", "serving", "benchmarks/*.py")  # what can change a figure; documents cannot


def machine() -> dict[str, Any]:
    """The hardware and the versions that a figure depends on."""
    import torch  # here: a sender of requests starts for every turn and has no use for what takes a second to import

    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> dict[str, Any]:
    """The commit that runs, and whether the measured code has uncommitted changes."""
    try:
        return {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED_CODE)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}  # an installed copy has no history


def record(path: Path, command: str, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """Writes one run as JSON: command, commit, machine, created (UTC), seeds, whatever is in extra, rows.

    From a long run give `**commit()` taken at its start, for the checkout may move on meanwhile; `Run` does so.
    The file appears whole or not at all, so a killed run leaves no partial result.
    """
    head = {
        "command": command,
        **commit(),
        "machine": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result = {**head, "seeds": list(seeds), **extra, "rows": [dict(row) for row in rows]}
    text = json.dumps(result, indent=1) + "\n"
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


class Run:
    """One run of a benchmark: keeps the commit, time and load of the machine at its start, and writes the result."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        self.command = spelled_out(parser.prog, options)
        self._facts = {**commit(), "load_average_at_start": round(os.getloadavg()[0], 2)}
        self._began = time.perf_counter()

    def record(self, path: Path, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
        minutes = round((time.perf_counter() - self._began) / 60, 1)
        record(path, self.command, seeds, rows, minutes=minutes, **extra, **self._facts)


def spelled_out(command: str, options: argparse.Namespace) -> str:
    """The command with all its options, so that it makes the same result after a default has changed.

    `--out` and options that are not set are left out: they change no figure.
    """
    words = command.split()
    for name, value in vars(options).items():
        if name == "out" or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list | tuple):
            words.append(",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value))
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return shlex.join(words)


def argument_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, which prints the module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def result_file(text: str) -> Path:
    """The type of an argument `--out`: a new file, or an earlier result, which is replaced. Nothing else is, and that
    is said before anything has been measured."""
    path = Path(text)
    if path.exists() and not _is_result(path):
        raise argparse.ArgumentTypeError(f"{path} is not the result of a benchmark; name another file, or remove it.")
    return path


def _is_result(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"command", "commit", "machine", "rows"} <= found.keys()


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], tenths: Collection[str] = ()) -> str:
    """A markdown table whose columns are aligned, so that it reads as plain text too. Missing cells stay empty.

    tenths: columns whose floats have one decimal, such as percentages; elsewhere small floats have four.
    """
    cells = [[_cell(row.get(c), tenths=c in tenths) for c in columns] for row in rows]
    widths = [max([len(c), 3, *(len(line[n]) for line in cells)]) for n, c in enumerate(columns)]
    number = [all(_is_number(row.get(c)) for row in rows) for c in columns]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, number, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, number, strict=True)]
    return "\n".join([line(columns), line(rule), *(line(c) for c in cells)])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any, *, tenths: bool = False) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) <= 1 and not tenths else f"{value:.1f}"  # shares and seconds
    return str(value)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()
