"""The search compared with what people use today: one thread, one model, contenders in turns, answers checked first.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.peers

The table `latency` times a search from encoder states, for two model sizes, with 0 and 4 reasoning steps:

    generate, prefix function    transformers' `generate` with `prefix_allowed_tokens_fn` over a dict of prefixes
    generate, vectorised mask    the same with a LogitsProcessor of tensor operations only
    generate, greedy reasoning   two such calls: greedy reasoning tokens, then a beam over items (4 steps only)
    CTranslate2                  no constraint, encoder included: a reference for speed, its answers are not items
    ours, eager | ONNX | int8    `serving.search.beam` over the three runtimes, with one reasoning path

With reasoning, the first two spend their beams on reasoning tokens and items alike, as `generate` does with such a
model; the third searches as ours does. `check` is the comparison before timing: `same` (items and scores of ours,
eager), `rescored` (another search, but our network gives its paths the same scores) or, for int8, the share of the
best ten items that eager finds too (weights are random here; export compares trained ones).

`floor` rows are the matrix products of the search alone (`floor.py`), by two libraries; the faster one is the floor.
`paths` is the cost of reasoning paths, `breakdown` where the time goes, `bars` the targets and whether they are met.

Times are CPU time of the process, all threads together, which other work on the machine affects less than the clock
(`wall_ms`): medians over runs. Contenders take turns of a tenth of a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.peers_measure import EAGER, FLOORS, FUNCTION, ONNX, SEED, Row, measure
from benchmarks.engine.sizes import ITEMS, SIZES, VOCABULARY
from benchmarks.plots import BLUE, GREY, drawing

SHAPES = ((1, 20), (1, 50), (1, 100), (8, 50))  # batch, beams
STEPS = (0, 4)
PATHS = (1, 2, 4, 8)
MAIN = (1, 50)  # the shape of bars, paths, breakdown and plot

LATENCY = ["contender", "size", "steps", "batch", "beams", "ms", "times_ours", "check", "wall_ms", "runs"]
COST = ["size", "steps", "paths", "ms", "times_no_steps"]
WHERE = [
    "runtime",
    "size",
    "steps",
    "encode",
    "cross_keys_values",
    "step_products",
    "step_other",
    "constraint",
    "topk",
    "rest",
]
BARS = ["bar", "size", "value", "limit", "holds"]


def main() -> None:
    parser = argument_parser("benchmarks.engine.peers", __doc__)
    parser.add_argument("--seconds", type=float, default=8, help="time for all turns of one case")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/peers.json")
    options = parser.parse_args()
    run, rows = Run(parser, options), list[Row]()
    for size, config in SIZES.items():
        rows += measure(size, config, VOCABULARY, ITEMS, SHAPES, STEPS, PATHS, MAIN, options.seconds)
    rows += bars(rows, MAIN)
    for name, columns in (("latency", LATENCY), ("paths", COST), ("breakdown", WHERE), ("bars", BARS)):
        print(f"\n{name}\n" + table([row for row in rows if row["table"] == name], columns), flush=True)
    run.record(options.out, [SEED], rows, items=ITEMS)


def bars(rows: list[Row], shape: tuple[int, int]) -> list[Row]:
    """The targets of the search, and whether these rows meet them: the floor's at all shapes, the others at `shape`."""
    found: list[Row] = []

    def bar(size: str, text: str, value: float, limit: str, holds: bool) -> None:
        row = {"table": "bars", "size": size, "bar": text, "value": f"{value:.2f}", "limit": limit, "holds": holds}
        found.append(row)

    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        latency = [row for row in of_size if row["table"] == "latency"]
        wrong = sum(row["check"] == "differs" for row in latency)
        bar(size, "searches whose answers differ", wrong, "<= 0", wrong == 0)
        cases = dict.fromkeys((row["batch"], row["beams"], row["steps"]) for row in latency)
        for batch, beams, steps in cases:
            of_case = [row for row in latency if (row["batch"], row["beams"], row["steps"]) == (batch, beams, steps)]
            ms = {row["contender"]: row["ms"] for row in of_case}
            case = f"{batch}x{beams}, {steps} steps"
            if (batch, beams) == shape:
                times, least = ms[FUNCTION] / min(ms[EAGER], ms[ONNX]), 8 if steps else 10
                bar(size, f"{case}: {FUNCTION} / ours", times, f">= {least}", times >= least)
            times = ms[ONNX] / min(ms[name] for name in FLOORS)
            bar(size, f"{case}: {ONNX} / floor", times, "<= 1.4", times <= 1.4)
        for row in of_size:
            if row["table"] == "paths" and row["steps"]:
                times = row["times_no_steps"]
                text = f"{shape[0]}x{shape[1]}: {row['steps']} steps, paths {row['paths']} / no steps"
                bar(size, text, times, "<= 1.7", times <= 1.7)
    return found


NAMES = {"CTranslate2": "CTranslate2\n(no constraint, encoder in)"}  # where the table's name says too little
COLOURS = (GREY, BLUE)  # without and with reasoning


def plot(result: dict[str, Any], path: Path, shape: tuple[int, int] = MAIN) -> None:
    """Time of one search by contender, for each model size, without and with reasoning."""
    latency = [row for row in result["rows"] if row["table"] == "latency"]
    shown = [row for row in latency if (row["batch"], row["beams"]) == shape]
    sizes = list(dict.fromkeys(row["size"] for row in shown))
    slowest_first = list(dict.fromkeys(row["contender"] for row in sorted(shown, key=lambda row: -row["ms"])))
    names = [name for name in slowest_first if name not in FLOORS]
    with drawing(path, 10, 3.8) as figure:
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for panel, size in zip(panels, sizes, strict=True):
            _plot_size(panel, [row for row in shown if row["size"] == size], names)
            panel.set_title(f"{size} parameters", fontsize=10, loc="left")
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
        figure.supxlabel(f"CPU ms of one search, {shape[0]} user x {shape[1]} beams, one core, log scale", fontsize=9)


def _plot_size(panel: Any, rows: list[Row], names: list[str]) -> None:
    ms = {(row["contender"], row["steps"]): row["ms"] for row in rows}
    steps = sorted({row["steps"] for row in rows})
    for index, (count, colour) in enumerate(zip(steps, COLOURS, strict=True)):
        offset = (index - (len(steps) - 1) / 2) * 0.38
        bars_of_count = {y + offset: ms[name, count] for y, name in enumerate(names) if (name, count) in ms}
        bars = panel.barh(
            *zip(*bars_of_count.items(), strict=True), 0.36, color=colour, label=f"{count} reasoning steps"
        )
        panel.bar_label(bars, fmt=lambda x: f"{x:.0f}" if x >= 10 else f"{x:.1f}", padding=2, fontsize=8)
        floor = min(value for (name, at), value in ms.items() if name in FLOORS and at == count)
        label = "the matrix products of a search alone" if index else None
        panel.axvline(floor, color=colour, linestyle=":", linewidth=1.5, label=label)
    panel.set_xscale("log")
    panel.set_xlim(left=1, right=2.2 * max(ms.values()))
    panel.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
