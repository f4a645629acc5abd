"""What every benchmark shares: the record of a run with its machine and commit, and tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from serving.files import atomic_write

ROOT = Path(__file__).parents[1]
MEASURED_CODE = ("app", "training", "serving", "benchmarks/*.py")  # what can change a figure; documents cannot


def machine() -> dict[str, Any]:
    """The hardware and the versions a figure depends on."""
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
    """The commit that ran, and whether tracked code of what is measured differed from it."""
    try:
        return {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED_CODE)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}  # an installed copy has no history


def record(path: Path, command: str, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """Writes one run as JSON: command, commit, machine, created (UTC), seeds, whatever is in extra, rows.

    Give `minutes` in extra, and from a long run `**commit()` taken at its start: the checkout may move on meanwhile.
    The file appears whole or not at all, so a killed run leaves no half a result.
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
