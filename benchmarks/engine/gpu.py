"""The search on a GPU: the CPU's answers first, then how long, how many a second, the constraint, and what helped.

    python -m benchmarks.engine.gpu

    parity      the items and scores of eager torch on the CPU, eager and from a graph, for every kind of request
    latency     a search from encoder states on the device to beams on the device, from one graph, in float32: `ms`
                with nothing else to do, `searches_per_s` where the next one always waits
    constraint  the trie's share of a step in a catalogue of ten million, alone and with the top-k after it, in a graph
    ladder      the same two figures, technique by technique (`gpu_ladder.py`); answers are compared before timing:
                `same` items and scores, or for bfloat16, which rounds otherwise, the share of float32's best ten items
    aims        what is asked of all this, and whether it holds

Times are CUDA events' after warm-up, medians. Work comes in the order of its importance and ends in time: what would
not be done within `--minutes` is left out, and named in the result. `--device cpu --smoke` runs the same code on tiny
models, where a graph is only played: to see it work, not for figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from benchmarks.common import ROOT, commit, record, table
from benchmarks.engine.gpu_cells import SEED, Plan, Row, Subject, constraint
from benchmarks.engine.gpu_ladder import BFLOAT16
from benchmarks.engine.sizes import ITEMS, SIZES, VOCABULARY
from serving.items.vocabulary import Vocabulary
from serving.network.t5 import ModelConfig

RESULT = ROOT / "benchmarks/results/gpu.json"
RESERVE = 20.0  # seconds: Python's start before the clock runs, and writing the result
# Seconds that the first cell of a part may take; the next are taken to need what the longest before them did.
FIRST = {"parity": 30.0, "latency": 5.0, "ladder": 30.0, "constraint": 60.0}

FULL = Plan(
    VOCABULARY, SIZES, ITEMS, steps=(0, 2, 4, 8), batches=(1, 8, 32, 128), beams=(20, 50, 100), aim=(4, 50),
    ladder=(1, 32), catalogue=10**7, seconds=0.3,
)  # fmt: skip
TINY = Vocabulary(max_steps=2, codebook_sizes=(12, 12, 12), reasoning_codes=7)
SMOKE = Plan(
    TINY, {"tiny": ModelConfig(TINY.size, 16, 8, 32, num_layers=2, num_decoder_layers=2, num_heads=2)}, 300,
    steps=(0, 2), batches=(1, 3), beams=(6, 9), aim=(2, 6), ladder=(1, 3), catalogue=3000, seconds=0,
)  # fmt: skip

COLUMNS = {
    "parity": ["size", "steps", "request", "eager", "graph", "largest_error"],
    "latency": ["size", "steps", "batch", "beams", "ms", "p95_ms", "searches_per_s"],
    "constraint": ["items", "rows", "rules", "expand_us", "step_us"],
    "ladder": ["size", "steps", "batch", "beams", "rung", "ms", "searches_per_s", "times_faster", "check"],
    "aims": ["aim", "value", "limit", "holds"],
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8, help="all of it ends within so many (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it work at all?")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, of a full run on a GPU")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device here: run it where there is one, or see it work with --device cpu --smoke."
        )
    code, started = commit(), time.monotonic()
    plan, device = SMOKE if options.smoke else FULL, torch.device(options.device)
    with torch.inference_mode():
        rows, left_out, failed = work_through(cells(plan, device), 60 * options.minutes - RESERVE)
    rows += aims(plan, rows)
    for part, columns in COLUMNS.items():
        print(f"\n{part}\n" + table([row for row in rows if row["part"] == part], columns), flush=True)
    print(*(f"\nleft out, for want of time: {name}" for name in left_out), sep="")
    print(*(f"\nfailed: {name}: {error}" for name, error in failed.items()), sep="")
    out = options.out or (RESULT if device.type == "cuda" and not options.smoke else None)
    if out is not None:
        record(
            out,
            f"python -m benchmarks.engine.gpu --minutes {options.minutes:g}"
            + (f" --device {options.device}" if device.type != "cuda" else "")
            + (" --smoke" if options.smoke else ""),
            [SEED],
            rows,
            minutes=round((time.monotonic() - started) / 60, 1),
            items=plan.items,
            left_out=left_out,
            failed=failed,
            **code,
        )
    return 1 if failed or different(rows) else 0


@dataclass(frozen=True)
class Cell:
    """Work that is done whole or left out."""

    part: str
    name: str
    run: Callable[[], list[Row]]


def cells(plan: Plan, device: torch.device) -> Iterator[Cell]:
    """Parity, what aims look at, the ladder, the constraint; then the rest of the grid, the aims' beams first."""
    subject = cache(partial(Subject, plan, device))
    steps, beams = plan.aim

    def of(part: str, size: str, count: int, *shape: int) -> Cell:
        """A subject has a method of each part's name. shape: batch and beams, where the part wants them."""
        name = f"{size}, {count} steps {'x'.join(map(str, shape))}".rstrip()
        return Cell(part, name, lambda: getattr(subject(size), part)(count, *shape))

    for size, count in product(plan.sizes, plan.steps):
        yield of("parity", size, count)
    for size, batch in product(plan.sizes, plan.batches):
        yield of("latency", size, steps, batch, beams)
    for size, batch in product(plan.sizes, plan.ladder):
        yield of("ladder", size, steps, batch, beams)
    yield Cell("constraint", f"{plan.catalogue:,} items", lambda: constraint(plan, device))
    for width in sorted(plan.beams, key=lambda width: width != beams):
        for size, count, batch in product(plan.sizes, plan.steps, plan.batches):
            if (count, width) != plan.aim:
                yield of("latency", size, count, batch, width)


def work_through(
    work: Iterable[Cell], seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[list[Row], list[str], dict[str, str]]:
    """Does the cells in order but begins none that would likely end late. Returns rows, what is left out, what failed.

    A cell that fails costs its own rows and no others: a GPU may be at hand for this once.
    """
    rows: list[Row] = []
    left_out: list[str] = []
    failed: dict[str, str] = {}
    began, longest = clock(), dict(FIRST)
    measured: set[str] = set()
    for cell in work:
        name, start = f"{cell.part}: {cell.name}", clock()
        if start - began + longest[cell.part] > seconds:
            left_out.append(name)
            continue
        print(f"{start - began:5.0f} s  {name}", file=sys.stderr, flush=True)
        try:
            rows += [{"part": cell.part, **row} for row in cell.run()]
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        took = clock() - start
        longest[cell.part] = max(longest[cell.part], took) if cell.part in measured else took
        measured.add(cell.part)
    return rows, left_out, failed


def aims(plan: Plan, rows: list[Row]) -> list[Row]:
    """What is asked of the smallest model, in float32 and in bfloat16, and of the constraint. No value: left out."""
    steps, beams = plan.aim
    size = next(iter(plan.sizes))
    shape = {"size": size, "steps": steps, "beams": beams}
    searches = [row for row in rows if "ms" in row and shape.items() <= row.items()]
    exact = [row for row in searches if row["part"] == "latency"]
    half = [row for row in searches if row.get("rung") == BFLOAT16]
    trie = [row["expand_us"] / 1000 for row in rows if row["part"] == "constraint" and not row["rules"]]
    found: list[Row] = []

    def aim(text: str, value: float | None, limit: float, at_most: bool) -> None:
        row: Row = {"part": "aims", "aim": text, "limit": f"{'<=' if at_most else '>='} {limit:g}"}
        if value is not None:
            row |= {"value": f"{value:.3f}", "holds": value <= limit if at_most else value >= limit}
        found.append(row)

    for kind, some in (("float32", exact), ("bfloat16", half)):
        search = f"{size} {kind}, {steps} steps"
        quickest = min((row["ms"] for row in some if row["batch"] == 1), default=None)
        aim(f"{search}, 1x{beams}: ms", quickest, 2, at_most=True)
        most = max((row["searches_per_s"] for row in some), default=None)
        aim(f"{search}, {beams} beams, best batch: searches a second", most, 8000, at_most=False)
    aim(f"constraint, {plan.catalogue:,} items: ms a step", max(trie, default=None), 0.05, at_most=True)
    aim("answers that differ", different(rows), 0, at_most=True)
    return found


def different(rows: list[Row]) -> int:
    """How many searches found anything else than they should have."""
    return sum("differs" in (row.get("check"), row.get("eager"), row.get("graph")) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
