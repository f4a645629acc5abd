"""The cells of `gpu.py`: parity, latency and ladder for one model size, and the constraint alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.engine import constraint_contenders
from benchmarks.engine.answers import Paths, overlap, same_answers
from benchmarks.engine.constraint_rules import RULED, SUBSET, rule_book
from benchmarks.engine.gpu_ladder import BFLOAT16, ONE_ROW, Case, Model, as_paths, run_again, rungs
from benchmarks.engine.sizes import HISTORY_ITEMS, clustered_codes, random_network
from serving.items.blocked import Blocked
from serving.items.rules import RuleBook
from serving.items.trie import Trie, build_trie
from serving.items.vocabulary import Vocabulary
from serving.network.t5 import ModelConfig
from serving.search.beam import search, search_settings
from serving.search.cuda_graph import GraphSearch, capture_cuda_graph, padded_batch
from serving.search.decoder import stable_topk
from serving.types import NEG_INF, BundleSettings, Rules

SEED = 0
TOLERANCE = 1e-4  # of a score, the sum of up to 12 log-probabilities
WARM_UP = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured. aim: steps and beams of the searches that the aims refer to. ladder: its batches. catalogue:
    items in the constraint's trie. seconds: per figure."""

    vocabulary: Vocabulary
    sizes: dict[str, ModelConfig]
    items: int
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    beams: tuple[int, ...]
    aim: tuple[int, int]
    ladder: tuple[int, ...]
    catalogue: int
    seconds: float


# Time


def milliseconds(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """The time of `count` runs, one after the other, waiting for the last only."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - began) * 1000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


def single_runs(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds, ascending, of at least WARM_UP runs that are each waited for, after as many to warm up."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    while len(times) < WARM_UP or sum(times) < 1000 * seconds:
        times.append(milliseconds(run, device, 1))
    return sorted(times)


def figures(run: Callable[[], Any], device: torch.device, batch: int, seconds: float) -> Row:
    times = single_runs(run, device, seconds)
    median = statistics.median(times)
    count = max(1, int(1000 * seconds / median))
    return {
        "ms": round(median, 3),
        "p95_ms": round(times[int(0.95 * len(times))], 3),
        "searches_per_s": round(1000 * batch * count / milliseconds(run, device, count)),
        "runs": len(times),
    }


# Searches


class Subject:
    """One model size, on the CPU (`here`) and on the device (`there`), with encoded histories for the largest batch."""

    def __init__(self, plan: Plan, device: torch.device, size: str) -> None:
        self.plan, self.device, self.size = plan, device, size
        vocabulary, record = plan.vocabulary, None if device.type == "cuda" else run_again
        codes = clustered_codes(plan.items, vocabulary.tokens_per_item, vocabulary.codebook_sizes[0], SEED)
        tokens = vocabulary.tokens_of(codes)
        settings = search_settings(vocabulary, BundleSettings(dense_candidates=min(plan.beams)))
        network = random_network(plan.sizes[size], plan.items, SEED)
        self.parameters = sum(parameter.numel() for parameter in network.t5.parameters())
        self.here = Model.make(network, torch.from_numpy(tokens.astype(np.int64)), build_trie(tokens), settings)
        self.there = self.here.to(device)
        self.graph = GraphSearch(self.there.runtime, self.there.trie, settings, record)
        self.rungs = rungs(self.there, record)
        rows = np.random.default_rng(SEED).integers(0, plan.items, (max(plan.batches), HISTORY_ITEMS))
        history = self.there.runtime.item_tokens[torch.from_numpy(rows).to(device)].flatten(1)
        self.mask = torch.ones_like(history, dtype=torch.bool)
        self.hidden = self.there.runtime.encode(history, self.mask)

    def latency(self, steps: int, batch: int, beams: int) -> list[Row]:
        hidden, mask = self.hidden[:batch], self.mask[:batch]
        run = partial(self.graph.search, hidden, mask, steps=steps, beam_width=beams, paths=1)
        return [self._row(steps, batch, beams) | figures(run, self.device, batch, self.plan.seconds)]

    def ladder(self, steps: int, batch: int, beams: int) -> list[Row]:
        """A rung whose answers differ from the search's is not timed."""
        case = Case(self.hidden[:batch], self.mask[:batch], steps, beams)
        expected = self.rungs[ONE_ROW](case)
        rows: list[Row] = []
        for name, rung in self.rungs.items():
            found, row = rung(case), self._row(steps, batch, beams) | {"rung": name}
            if name == BFLOAT16:
                row["check"] = f"{overlap(found, expected):.2f} of the best ten"
            else:
                row["check"] = check(found, expected)
            if row["check"] != "differs":
                row |= figures(partial(rung, case), self.device, batch, self.plan.seconds)
                row["times_faster"] = round(rows[0].get("ms", row["ms"]) / row["ms"], 2) if rows else 1.0
            rows.append(row)
        return rows

    def parity(self, steps: int) -> list[Row]:
        """Three requests with histories of different lengths, for every kind of request that needs its own graph."""
        batch, beams = 3, self.plan.aim[1]
        hidden, mask = self.hidden[:batch], self.mask[:batch].clone()
        mask[1, mask.shape[1] // 2 :], mask[2, 1:] = False, False
        here, there, rows = rule_book(self.here.trie, rows=4), rule_book(self.there.trie, rows=4), []
        for kind, options in kinds_of_requests(self.plan.items).items():
            expected = eager(self.here, here, hidden, mask, steps, beams, options)
            with there.blocked(options.rules + [Rules()] * (padded_batch(batch) - batch)) as blocked:
                graph = as_paths(self.graph.search(
                    hidden, mask, steps=steps, beam_width=beams, paths=options.paths, blocked=blocked,
                    dense_weight=options.weight_on(self.device),
                ))  # fmt: skip
            found = {"eager": eager(self.there, there, hidden, mask, steps, beams, options), "graph": graph}
            found = {name: Paths(answer.tokens.cpu(), answer.scores.cpu()) for name, answer in found.items()}
            finite = expected.scores > NEG_INF
            errors = [float((answer.scores - expected.scores)[finite].abs().max()) for answer in found.values()]
            checks = {name: check(answer, expected) for name, answer in found.items()}
            rows.append({"size": self.size, "steps": steps, "request": kind, **checks, "largest_error": max(errors)})
        return rows

    def _row(self, steps: int, batch: int, beams: int) -> Row:
        return {"size": self.size, "parameters": self.parameters, "steps": steps, "batch": batch, "beams": beams}


def check(found: Paths, expected: Paths) -> str:
    return "same" if same_answers(found, expected, TOLERANCE) else "differs"


@dataclass(frozen=True)
class Options:
    """The options of a batch of three requests. dense_weight: one per request, or none."""

    rules: list[Rules]
    dense_weight: tuple[float, ...] | None = None
    paths: int = 1

    def weight_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.dense_weight is None else torch.tensor(self.dense_weight, device=device)


def kinds_of_requests(items: int) -> dict[str, Options]:
    free, ruled, weight = [Rules()] * 3, some_rules(items), (0.0, 0.5, 1.0)
    return {
        "plain": Options(free),
        "rules": Options(ruled),
        "dense score": Options(free, weight),
        "four paths": Options(free, paths=4),
        "all of these": Options(ruled, weight, 4),
    }


def eager(
    model: Model, book: RuleBook, hidden: torch.Tensor, mask: torch.Tensor, steps: int, beams: int, options: Options
) -> Paths:
    device = model.runtime.device
    cross = model.runtime.cross_keys_values(hidden.to(device), mask.to(device))
    settings = replace(model.settings, paths=options.paths)
    with book.blocked(options.rules) as blocked:
        return as_paths(search(
            model.runtime, model.trie, settings, cross, steps=steps, beam_width=beams, blocked=blocked,
            dense_weight=options.weight_on(device),
        ))  # fmt: skip


def some_rules(items: int) -> list[Rules]:
    """Three requests: excluded items, a subset with a deny list, and an allow list shorter than any beam."""
    rng = np.random.default_rng(SEED)
    some = rng.choice(items, 25 + min(10_000, items // 9), replace=False).tolist()
    return [Rules(exclude=(*some[:20],)), Rules(catalogue=SUBSET, deny=(*some[25:],)), Rules(allow=(*some[20:25],))]


# The constraint


def constraint(plan: Plan, device: torch.device) -> list[Row]:
    """A walk from root to leaves over random log-probabilities, as one graph; times per step, as in `constraint.py`."""
    levels, vocabulary = constraint_contenders.LEVELS, constraint_contenders.VOCABULARY
    codes = constraint_contenders.clustered_codes(plan.catalogue, SEED)
    first = constraint_contenders.FIRST_TOKEN + np.arange(levels, dtype=np.int32) * constraint_contenders.CODES
    trie, beams = build_trie(codes + first).to(device), plan.aim[1]
    book, rows = rule_book(trie, rows=8), []
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(SEED)
        log_probs = [
            torch.randn(batch, beams if level else 1, vocabulary, generator=generator).log_softmax(-1).to(device)
            for level in range(levels)
        ]
        for ruled in (False, True):
            rules = [some_rules(plan.catalogue)[1] if ruled else Rules()] * batch
            with book.blocked(rules) as blocked:
                nodes = walk(trie, log_probs, blocked, beams)
                runs = {
                    "expand_us": partial(expand_all, trie, log_probs, blocked, nodes),
                    "step_us": partial(walk, trie, log_probs, blocked, beams),
                }
                row: Row = {"items": plan.catalogue, "rows": batch * beams, "rules": RULED if ruled else ""}
                for name, run in runs.items():
                    times = single_runs(launched(run, device), device, plan.seconds)
                    row[name] = round(1000 * statistics.median(times) / levels, 1)
            rows.append(row)
    return rows


def expand_all(
    trie: Trie, log_probs: list[torch.Tensor], blocked: Blocked | None, nodes: list[torch.Tensor]
) -> list[torch.Tensor]:
    return [expand(trie, log_probs[level], blocked, node, level)[0] for level, node in enumerate(nodes)]


def expand(
    trie: Trie, log_probs: torch.Tensor, blocked: Blocked | None, node: torch.Tensor, level: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if blocked is None:
        return trie.expand(log_probs, node, level)
    return blocked.expand(trie, log_probs, node, level)


def walk(trie: Trie, log_probs: list[torch.Tensor], blocked: Blocked | None, beams: int) -> list[torch.Tensor]:
    """Follows the best beams from the root, as the search does. Returns the nodes at the start of each level."""
    batch = len(log_probs[0])
    scores = torch.zeros(batch, 1, device=log_probs[0].device)
    nodes = [torch.zeros(batch, 1, dtype=torch.int64, device=scores.device)]
    for level in range(trie.levels):
        step, child = expand(trie, log_probs[level], blocked, nodes[-1], level)
        candidates = (scores.unsqueeze(-1) + step).flatten(1)
        flat = stable_topk(candidates, child.flatten(1), min(beams, candidates.shape[1]))
        scores = candidates.gather(1, flat)
        nodes.append(child.flatten(1).gather(1, flat).long())
    return nodes[:-1]


def launched(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    return capture_cuda_graph(run, None)[0] if device.type == "cuda" else run
