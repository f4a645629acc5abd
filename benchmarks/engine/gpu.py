"""The search on a GPU: parity with the CPU, latency, throughput, the constraint, and a ladder of techniques.

    python -m benchmarks.engine.gpu

    parity      items and scores, eager and from a graph, compared with eager torch on the CPU, for all request kinds
    latency     a search from encoder states on the device to beams on the device, as one graph in float32: `ms` of a
                search alone, `searches_per_s` when the next search is always waiting
    constraint  the trie's share of a step in a catalogue of ten million, alone and with the top-k after it, as a graph
    ladder      the same two figures, technique by technique (`gpu_ladder.py`); answers are compared before timing:
                `same` items and scores or, for bfloat16, which rounds differently, the share of float32's best ten
    aims        the targets, and whether they are met

Times are medians of CUDA events after a warm-up. The most important work comes first; work that would not end within
`--minutes` is left out and named in the result. `--device cpu --smoke` runs the same code on tiny models, with a
replacement for graphs: it shows that the code works, its figures mean nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.gpu_cells import SEED, Plan, Row, Subject, constraint
from benchmarks.engine.gpu_ladder import BFLOAT16
from benchmarks.engine.sizes import ITEMS, SIZES, VOCABULARY
from serving.items.vocabulary import Vocabulary
from serving.network.t5 import ModelConfig

RESULT = ROOT / "benchmarks/results/gpu.json"
RESERVE = 20.0  # seconds: starting Python before the clock runs, and writing the result
# Seconds reserved for the first cell of a part; later cells are expected to take as long as the longest before them.
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
    parser = argument_parser("benchmarks.engine.gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=8, help="limit for the whole run (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--out", type=result_file, help="a full run on a GPU writes benchmarks/results/gpu.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device here: run this where there is one, or try it with --device cpu --smoke."
        )
    run = Run(parser, options)
    plan, device = SMOKE if options.smoke else FULL, torch.device(options.device)
    with torch.inference_mode():
        rows, left_out, failed = work_through(cells(plan, device), 60 * options.minutes - RESERVE)
    rows += aims(plan, rows)
    for part, columns in COLUMNS.items():
        print(f"\n{part}\n" + table([row for row in rows if row["part"] == part], columns), flush=True)
    print(*(f"\nleft out for lack of time: {name}" for name in left_out), sep="")
    print(*(f"\nfailed: {name}: {error}" for name, error in failed.items()), sep="")
    out = options.out or (RESULT if device.type == "cuda" and not options.smoke else None)
    if out is not None:
        run.record(out, [SEED], rows, items=plan.items, left_out=left_out, failed=failed)
    return 1 if failed or different(rows) else 0


@dataclass(frozen=True)
class Cell:
    """A unit of work, done completely or left out."""

    part: str
    name: str
    run: Callable[[], list[Row]]


def cells(plan: Plan, device: torch.device) -> Iterator[Cell]:
    """Parity, the aims' latencies, the ladder, the constraint; then the rest of the grid, the aims' beams first."""
    subject = cache(partial(Subject, plan, device))
    steps, beams = plan.aim

    def of(part: str, size: str, count: int, *shape: int) -> Cell:
        """A subject has a method named after each part. shape: batch and beams, where the part takes them."""
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
    """Runs the cells in order, except those that would likely end late. Returns rows, cells left out, errors by cell.

    A cell that fails loses its own rows only: the GPU may not be available again.
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
    """The targets of the smallest model, in float32 and in bfloat16, and of the constraint. No value: not measured."""
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
        fastest = min((row["ms"] for row in some if row["batch"] == 1), default=None)
        aim(f"{search}, 1x{beams}: ms", fastest, 2, at_most=True)
        most = max((row["searches_per_s"] for row in some), default=None)
        aim(f"{search}, {beams} beams, best batch: searches a second", most, 8000, at_most=False)
    aim(f"constraint, {plan.catalogue:,} items: ms a step", max(trie, default=None), 0.05, at_most=True)
    aim("answers that differ", different(rows), 0, at_most=True)
    return found


def different(rows: list[Row]) -> int:
    """The number of searches whose answers differ."""
    return sum("differs" in (row.get("check"), row.get("eager"), row.get("graph")) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
