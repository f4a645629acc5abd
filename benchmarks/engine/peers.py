"""The search beside what people use today: one thread, one model, contenders in turns, answers compared before timing.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.peers

The table `latency` times a search from encoder states, for two sizes of model, with 0 and 4 reasoning steps:

    generate, prefix function    transformers' `generate` with `prefix_allowed_tokens_fn` over a dict of prefixes
    generate, vectorised mask    the same with a LogitsProcessor of tensor operations only
    generate, greedy reasoning   two calls of that: greedy reasoning tokens, then a beam of items (4 steps only)
    CTranslate2                  no constraint, its encoder included: a bound on speed, its answers are no items
    ours, eager | ONNX | int8    `serving.search.beam` over the three runtimes, with one reasoning path

With reasoning, the first two spend their beams on reasoning tokens and items alike, which is what `generate` does with
such a model; the third means what ours means. `check` says what was found before timing: `same` (items and scores of
ours, eager), `rescored` (another search, but our network gives its paths the same scores) or, for int8, the share of
the best ten items that eager finds too (weights are random here: the gate on a trained model is the export's).

`floor` rows are the matrix products of the search alone (`floor.py`), by two libraries; the faster one is the floor.
`paths` shows what reasoning paths cost, `breakdown` where the time goes, `bars` what is asked of all this.

Times are the process's CPU time, all threads together, so that a neighbour on the machine costs the figures less;
`wall_ms` is beside it. Medians over runs; contenders take turns of a tenth of a second.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, commit, record, table
from benchmarks.engine.answers import Paths, overlap, same_answers
from benchmarks.engine.breakdown import breakdown, clock
from benchmarks.engine.contenders import (
    Case,
    Contender,
    Model,
    generate_greedy_thought,
    generate_with_function,
    generate_with_mask,
    make_case,
    make_model,
    ours,
    rescore,
    translate,
)
from benchmarks.engine.floor import Pass, in_onnx, in_order, in_torch, products_of_search
from benchmarks.engine.peers_plot import draw
from benchmarks.engine.sizes import ITEMS, SIZES, VOCABULARY, clustered_codes
from serving.items.vocabulary import END, Vocabulary
from serving.network.eager import EagerRuntime
from serving.network.onnx import OnnxRuntime
from serving.network.runtime import Runtime
from serving.network.t5 import ModelConfig
from serving.types import SearchSettings

RESULT = ROOT / "benchmarks/results/peers.json"
PLOT = ROOT / "benchmarks/plots/peers.svg"
SEED = 0
SHAPES = ((1, 20), (1, 50), (1, 100), (8, 50))  # batch, beams
STEPS = (0, 4)
PATHS = (1, 2, 4, 8)
MAIN = (1, 50)  # the shape that bars, paths and breakdown look at

FUNCTION, MASK, GREEDY = "generate, prefix function", "generate, vectorised mask", "generate, greedy reasoning"
TRANSLATE = "CTranslate2"
EAGER, ONNX, INT8 = "ours, eager", "ours, ONNX", "ours, int8"
RUNTIMES: dict[str, Callable[[Model], Runtime]] = {
    EAGER: lambda model: EagerRuntime(model.network, model.item_tokens, "bidirectional"),
    ONNX: lambda model: OnnxRuntime(model.network, model.item_tokens, "bidirectional"),
    INT8: lambda model: OnnxRuntime(model.network, model.item_tokens, "bidirectional", int8=True),
}
FLOORS = {"floor, torch": in_torch, "floor, ONNX": in_onnx}
TOLERANCE = 1e-4  # of a score, the sum of up to 8 log-probabilities

LATENCY = ["contender", "size", "steps", "batch", "beams", "ms", "times_ours", "check", "wall_ms", "runs"]
COST = ["size", "steps", "paths", "ms", "times_no_steps"]
WHERE = ["runtime", "size", "steps", "encode", "memory", "step_products", "step_other", "constraint", "topk", "rest"]
BARS = ["bar", "size", "value", "limit", "holds"]

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=8, help="time for all turns of one case")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    code, started = commit(), time.perf_counter()
    rows: list[Row] = []
    for size, config in SIZES.items():
        rows += measure(size, config, VOCABULARY, ITEMS, SHAPES, STEPS, PATHS, MAIN, options.seconds)
    rows += bars(rows, MAIN)
    for name, columns in (("latency", LATENCY), ("paths", COST), ("breakdown", WHERE), ("bars", BARS)):
        print(f"\n{name}\n" + table([row for row in rows if row["table"] == name], columns), flush=True)
    record(
        options.out,
        f"python -m benchmarks.engine.peers --seconds {options.seconds:g}",
        [SEED],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        items=ITEMS,
        **code,
    )
    draw(rows, options.plot)


def measure(
    size: str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    items: int,
    shapes: tuple[tuple[int, int], ...],
    steps: tuple[int, ...],
    paths: tuple[int, ...],
    main_shape: tuple[int, int],
    seconds: float,
) -> list[Row]:
    """All rows but the bars for one size of model; every row has a `table` and a `size`."""
    codes = clustered_codes(items, vocabulary.tokens_per_item, vocabulary.codebook_sizes[0], SEED)
    model = make_model(config, vocabulary, codes, SEED)
    runtimes = {name: make(model) for name, make in RUNTIMES.items()}
    searches = {name: ours(model, runtime) for name, runtime in runtimes.items()}
    peers = {FUNCTION: generate_with_function(model), MASK: generate_with_mask(model), TRANSLATE: translate(model)}
    rows: list[Row] = []
    with torch.inference_mode():
        for batch, beams in shapes:
            for count in steps:
                print(f"{size}: {batch}x{beams}, {count} steps", file=sys.stderr, flush=True)
                case = make_case(model, count, batch, beams, SEED)
                contenders = searches | peers | ({GREEDY: generate_greedy_thought(model)} if count else {})
                rows += compare(model, case, contenders, seconds)
        rows += cost_of_paths(model, runtimes[ONNX], max(steps), paths, main_shape, seconds)
        for count in steps:
            case = make_case(model, count, *main_shape, SEED)
            for name, library in ((EAGER, "floor, torch"), (ONNX, "floor, ONNX")):
                rows.append({"runtime": name, **where(model, runtimes[name], case, library)})
    parameters = sum(p.numel() for p in model.network.t5.parameters())
    return [{"size": size, "parameters": parameters, **row} for row in rows]


def compare(model: Model, case: Case, contenders: Mapping[str, Contender], seconds: float) -> list[Row]:
    """One search by every contender, and its floor."""
    answers = {name: c.read(c.answer(case), case) for name, c in contenders.items()}
    checks = {name: check(model, case, name, found, answers[EAGER]) for name, found in answers.items()}
    floors = {name: in_order(make(_products(model, case))) for name, make in FLOORS.items()}
    runs = {name: partial(contender.answer, case) for name, contender in contenders.items()} | floors
    cpu, wall = in_turns(runs, seconds)
    best = min(statistics.median(cpu[name]) for name in (EAGER, ONNX))
    return [
        {
            "table": "latency",
            "contender": name,
            "steps": case.steps,
            "batch": case.batch,
            "beams": case.beams,
            "ms": round(statistics.median(cpu[name]) * 1000, 2),
            "times_ours": round(statistics.median(cpu[name]) / best, 2),
            "check": checks.get(name, ""),
            "wall_ms": round(statistics.median(wall[name]) * 1000, 2),
            "runs": len(cpu[name]),
        }
        for name in runs
    ]


def check(model: Model, case: Case, name: str, found: Paths, expected: Paths) -> str:
    """What is true of a contender's answer; `differs` is a fault of somebody's."""
    if name == INT8:
        return f"{overlap(found, expected):.2f}"
    if name == TRANSLATE or (case.steps and name in (FUNCTION, MASK)):
        scores = rescore(model, case, found.tokens, without=END if name == TRANSLATE else None)
        return "rescored" if (scores - found.scores).abs().max() <= TOLERANCE else "differs"
    return "same" if same_answers(found, expected, TOLERANCE) else "differs"


def in_turns(
    runs: Mapping[Any, Callable[[], Any]], seconds: float, least: int = 3
) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """CPU and wall seconds of every run, `least` times or more, after one that warms up.

    A turn is an eightieth of `seconds`, and one run at least: the quick ones then run as in a service, caches warm.
    """
    cpu: dict[Any, list[float]] = {name: [] for name in runs}
    wall: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    for count in itertools.count():
        if count >= least and time.perf_counter() - started > seconds:
            break
        for name, run in runs.items():
            until = time.perf_counter() + seconds / 80
            while len(cpu[name]) <= count or time.perf_counter() < until:
                begin, computed = time.perf_counter(), clock()
                run()
                cpu[name].append(clock() - computed)
                wall[name].append(time.perf_counter() - begin)
    return cpu, wall


def cost_of_paths(
    model: Model, runtime: Runtime, steps: int, paths: tuple[int, ...], shape: tuple[int, int], seconds: float
) -> list[Row]:
    """What reasoning costs, by the number of paths that are followed at once."""
    kinds = [(0, 1), *((steps, count) for count in paths)]
    cases = {count: make_case(model, count, *shape, SEED) for count in (0, steps)}
    runs = {kind: partial(ours(model, runtime, kind[1]).answer, cases[kind[0]]) for kind in kinds}
    cpu, _ = in_turns(runs, seconds)
    ms = {kind: statistics.median(cpu[kind]) * 1000 for kind in kinds}
    return [
        {
            "table": "paths",
            "steps": kind[0],
            "paths": kind[1],
            "ms": round(ms[kind], 2),
            "times_no_steps": round(ms[kind] / ms[0, 1], 2),
        }
        for kind in kinds
    ]


def where(model: Model, runtime: Runtime, case: Case, library: str, rounds: int = 15) -> Row:
    """Milliseconds by part; `step_products` is what the step's matrix products take alone, by the runtime's library."""
    settings = SearchSettings(tuple(model.vocabulary.start_tokens), model.vocabulary.reasoning_range)
    parts = breakdown(runtime, model.trie, settings, case.tokens, steps=case.steps, beams=case.beams, rounds=rounds)
    passes = [one for one in _products(model, case) if one.kind != "memory"]
    cpu, _ = in_turns({library: in_order(FLOORS[library](passes))}, seconds=0, least=rounds)
    products = statistics.median(cpu[library]) * 1000
    step = parts.pop("step")
    parts |= {"step_products": products, "step_other": step - products}
    return {"table": "breakdown", "steps": case.steps} | {part: round(ms, 2) for part, ms in parts.items()}


def bars(rows: list[Row], shape: tuple[int, int]) -> list[Row]:
    """What is asked of the search, and whether it holds in these rows: of the floor everywhere, else at one shape."""
    found: list[Row] = []

    def bar(size: str, text: str, value: float, limit: str, holds: bool) -> None:
        row = {"table": "bars", "size": size, "bar": text, "value": f"{value:.2f}", "limit": limit, "holds": holds}
        found.append(row)

    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        latency = [row for row in mine if row["table"] == "latency"]
        wrong = sum(row["check"] == "differs" for row in latency)
        bar(size, "searches whose answers differ", wrong, "<= 0", wrong == 0)
        cases = dict.fromkeys((row["batch"], row["beams"], row["steps"]) for row in latency)
        for batch, beams, steps in cases:
            ms = {
                r["contender"]: r["ms"]
                for r in latency
                if (r["batch"], r["beams"], r["steps"]) == (batch, beams, steps)
            }
            named = f"{batch}x{beams}, {steps} steps"
            if (batch, beams) == shape:
                times, least = ms[FUNCTION] / min(ms[EAGER], ms[ONNX]), 8 if steps else 10
                bar(size, f"{named}: {FUNCTION} / ours", times, f">= {least}", times >= least)
            times = ms[ONNX] / min(ms[name] for name in FLOORS)
            bar(size, f"{named}: {ONNX} / floor", times, "<= 1.4", times <= 1.4)
        for row in mine:
            if row["table"] == "paths" and row["steps"]:
                times, named = row["times_no_steps"], "{}x{}".format(*shape)
                text = f"{named}: {row['steps']} steps, paths {row['paths']} / no steps"
                bar(size, text, times, "<= 1.7", times <= 1.7)
    return found


def _products(model: Model, case: Case) -> list[Pass]:
    return products_of_search(
        model.network.t5.config,
        case.tokens.shape[1],
        model.vocabulary.tokens_per_item,
        batch=case.batch,
        steps=case.steps,
        paths=1,
        beams=case.beams,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
