"""What `peers.py` measures for one model size: latency, the cost of reasoning paths, and where the time goes."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.engine.answers import Paths, overlap, same_answers
from benchmarks.engine.breakdown import breakdown, clock
from benchmarks.engine.contenders import Case, Contender, Model, make_case, make_model, ours, rescore
from benchmarks.engine.contenders_ctranslate2 import translate
from benchmarks.engine.contenders_transformers import (
    generate_greedy_reasoning,
    generate_with_function,
    generate_with_mask,
)
from benchmarks.engine.floor import Pass, in_onnx, in_order, in_torch, products_of_search
from benchmarks.engine.sizes import clustered_codes
from serving.items.vocabulary import END, Vocabulary
from serving.network.eager import EagerRuntime
from serving.network.onnx import OnnxRuntime
from serving.network.runtime import Runtime
from serving.network.t5 import ModelConfig
from serving.search.beam import search_settings
from serving.types import BundleSettings

SEED = 0
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

Row = dict[str, Any]
K = TypeVar("K")


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
    """All rows of one model size but the bars; every row has a `table` and a `size`."""
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
                contenders = searches | peers | ({GREEDY: generate_greedy_reasoning(model)} if count else {})
                rows += compare(model, case, contenders, seconds)
        rows += cost_of_paths(model, runtimes[ONNX], max(steps), paths, main_shape, seconds)
        for count in steps:
            case = make_case(model, count, *main_shape, SEED)
            for name, library in ((EAGER, "floor, torch"), (ONNX, "floor, ONNX")):
                rows.append({"runtime": name, **parts_of_time(model, runtimes[name], case, library)})
    parameters = sum(p.numel() for p in model.network.t5.parameters())
    return [{"size": size, "parameters": parameters, **row} for row in rows]


def compare(model: Model, case: Case, contenders: Mapping[str, Contender], seconds: float) -> list[Row]:
    """One search by every contender, and the floor of that search."""
    answers = {name: c.read(c.answer(case), case) for name, c in contenders.items()}
    checks = {name: check(model, case, name, found, answers[EAGER]) for name, found in answers.items()}
    floors = {name: in_order(make(products_of_case(model, case))) for name, make in FLOORS.items()}
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
    """How a contender's answer compares with ours; `differs` means that one of them is wrong."""
    if name == INT8:
        return f"{overlap(found, expected):.2f}"
    if name == TRANSLATE or (case.steps and name in (FUNCTION, MASK)):
        scores = rescore(model, case, found.tokens, without=END if name == TRANSLATE else None)
        return "rescored" if (scores - found.scores).abs().max() <= TOLERANCE else "differs"
    return "same" if same_answers(found, expected, TOLERANCE) else "differs"


def in_turns(
    runs: Mapping[K, Callable[[], Any]], seconds: float, least: int = 3
) -> tuple[dict[K, list[float]], dict[K, list[float]]]:
    """CPU and wall-clock seconds of at least `least` runs of each, after one to warm up.

    A turn lasts an eightieth of `seconds` and at least one run: fast contenders run with warm caches, as in a service.
    """
    cpu: dict[K, list[float]] = {name: [] for name in runs}
    wall: dict[K, list[float]] = {name: [] for name in runs}
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
    """What reasoning costs, by the number of reasoning paths."""
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


def parts_of_time(model: Model, runtime: Runtime, case: Case, library: str, rounds: int = 15) -> Row:
    """Milliseconds by part. `step_products`: the step's matrix products alone, by the runtime's library."""
    settings = search_settings(model.vocabulary, BundleSettings())
    parts = breakdown(runtime, model.trie, settings, case.tokens, steps=case.steps, beams=case.beams, rounds=rounds)
    passes = [one for one in products_of_case(model, case) if one.kind != "cross_keys_values"]
    cpu, _ = in_turns({library: in_order(FLOORS[library](passes))}, seconds=0, least=rounds)
    products = statistics.median(cpu[library]) * 1000
    step = parts.pop("step")
    parts |= {"step_products": products, "step_other": step - products}
    return {"table": "breakdown", "steps": case.steps} | {part: round(ms, 2) for part, ms in parts.items()}


def products_of_case(model: Model, case: Case, blocks: Sequence[int] | None = None) -> list[Pass]:
    """blocks: see `products_of_search`."""
    return products_of_search(
        model.network.t5.config,
        case.tokens.shape[1],
        model.vocabulary.tokens_per_item,
        batch=case.batch,
        steps=case.steps,
        paths=1,
        beams=case.beams,
        blocks=blocks,
    )
