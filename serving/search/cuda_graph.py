"""Captures the whole search, selection included, as one CUDA graph per bucket: one launch instead of thousands.

Steps, beams and paths decide what an answer is and have to match exactly. Batch and history length do not and are
rounded up: missing requests and positions are padding that no answer depends on. A graph reads fixed buffers, so a
replay is: copy the inputs in, launch, copy the answer out. If a capture fails, that is an error; the search never falls
back to running slowly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch

from serving.errors import EngineError
from serving.items.blocked import Blocked
from serving.items.neighbours import NO_ITEM
from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.search.beam import search
from serving.search.memory import MemoryScores
from serving.types import Beams, SearchSettings

# Graphs kept; the least recently used one is dropped. Each holds its search's buffers, a few MB for the widest beams.
MAX_GRAPHS = 64
# Histories are padded to a multiple of this: attention over padding is cheap, another capture is not.
HISTORY_MULTIPLE = 32
# Items that a memory may list, at least, or the next power of two: histories of all lengths share a few graphs.
LEAST_MEMORY = 1024

Result = TypeVar("Result")
Capture = Callable[[Callable[[], Beams]], tuple[Callable[[], None], Beams]]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The searches that share a graph.

    items: how many buckets of times a history has room for, 0 if the network reads none. dense: whether any request has
    a dense weight. memory: the items that a memory may list, 0 if no request has one; gate: whether it has a gate;
    decides: as in `MemoryScores`. blocked: the address of the rules' buffers, whether lists are read and whether
    prepared sets are; None without rules.
    """

    batch: int
    history: int
    steps: int
    beam_width: int
    paths: int
    items: int
    dense: bool
    memory: int
    gate: bool
    decides: bool
    blocked: tuple[int, bool, bool] | None


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """A graph's fixed inputs, its launch, and the beams that a launch fills.

    Shapes: hidden (B, S, D), mask (B, S), buckets (B, bucket.items), dense_weight (B,). memory is None if no request of
    the bucket has one. blocked keeps the buffers that the graph reads from being freed and used for something else.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    buckets: torch.Tensor
    dense_weight: torch.Tensor
    memory: MemoryScores | None
    blocked: Blocked | None
    replay: Callable[[], None]
    beams: Beams


class GraphSearch:
    """Answers like `serving.search.beam.search`, by replaying graphs. Not thread-safe: one thread owns the device."""

    def __init__(self, runtime: Runtime, trie: Trie, settings: SearchSettings, capture: Capture | None = None) -> None:
        self.runtime, self.trie, self.settings = runtime, trie, settings
        self._capture = partial(capture_cuda_graph, pool=torch.cuda.graph_pool_handle()) if capture is None else capture
        self._graphs: OrderedDict[Bucket, CapturedGraph] = OrderedDict()  # least recently used first

    def search(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        *,
        steps: int,
        beam_width: int,
        paths: int,
        blocked: Blocked | None = None,
        dense_weight: torch.Tensor | None = None,
        memory: MemoryScores | None = None,
        buckets: torch.Tensor | None = None,
    ) -> Beams:
        """Shapes: hidden (B, S, D) float, mask (B, S) bool; the rest as in `beam.search`. Raises EngineError.

        buckets: see `StreamRec.history_bias`.

        blocked must cover the padded batch: `padded_batch(B)` rows, in buffers that are never moved.
        """
        batch, history, _ = hidden.shape
        bucket = Bucket(
            padded_batch(batch),
            _rounded(history),
            steps,
            beam_width,
            paths,
            0 if buckets is None else _rounded(history),
            dense_weight is not None,
            0 if memory is None else _power_of_two(max(memory.items.shape[1], LEAST_MEMORY)),
            memory is not None and memory.gate is not None,
            memory is not None and memory.decides,
            None if blocked is None else (blocked.inverted.data_ptr(), *blocked.reads),
        )
        if blocked is not None and len(blocked.own) != bucket.batch:
            raise EngineError(f"The rules cover {len(blocked.own)} requests; pad them to {bucket.batch}.")
        graph = self._graphs.get(bucket) or self._add(bucket, hidden.shape[2], blocked)
        self._graphs.move_to_end(bucket)
        graph.hidden[:batch, :history].copy_(hidden)
        graph.hidden[:batch, history:].zero_()  # masked, but 0 times a NaN of an earlier request is a NaN
        graph.mask[:batch].fill_(False)
        graph.mask[:batch, :history].copy_(mask)
        if buckets is not None:
            graph.buckets[:batch].zero_()
            graph.buckets[:batch, : buckets.shape[1]].copy_(buckets)
        if dense_weight is not None:
            graph.dense_weight[:batch].copy_(dense_weight)
        if graph.memory is not None and memory is not None:
            touched = memory.items.shape[1]
            graph.memory.items[:batch, :touched].copy_(memory.items)
            graph.memory.items[:batch, touched:].fill_(NO_ITEM)
            graph.memory.scores[:batch, :touched].copy_(memory.scores)
            graph.memory.elsewhere[:batch].copy_(memory.elsewhere)
            if graph.memory.gate is not None and memory.gate is not None:
                graph.memory.gate[:batch].copy_(memory.gate)
        graph.replay()
        # The next replay overwrites the beams, so the caller gets a copy.
        return Beams(*(getattr(graph.beams, field.name)[:batch].clone() for field in fields(Beams)))

    def _add(self, bucket: Bucket, width: int, blocked: Blocked | None) -> CapturedGraph:
        device = self.runtime.device
        hidden = torch.zeros(bucket.batch, bucket.history, width, device=device)
        mask = torch.zeros(bucket.batch, bucket.history, dtype=torch.bool, device=device)
        mask[:, 0] = True  # the attention of a padded request needs one position, or its rows are NaN
        buckets = torch.zeros(bucket.batch, bucket.items, dtype=torch.int64, device=device)
        dense_weight = torch.zeros(bucket.batch, device=device)
        memory = None
        if bucket.memory:
            gate = torch.zeros(bucket.batch, device=device) if bucket.gate else None
            items = torch.full((bucket.batch, bucket.memory), NO_ITEM, dtype=torch.int64, device=device)
            scores, elsewhere = torch.zeros(items.shape, device=device), torch.zeros(bucket.batch, device=device)
            memory = MemoryScores(items, scores, elsewhere, gate, bucket.decides)
        settings = replace(self.settings, paths=bucket.paths)
        if blocked is not None:
            blocked = replace(blocked, most=None)  # which differs between the batches that a graph serves

        def run() -> Beams:
            return search(
                self.runtime,
                self.trie,
                settings,
                self.runtime.cross_keys_values(hidden, mask, buckets if bucket.items else None),
                steps=bucket.steps,
                beam_width=bucket.beam_width,
                blocked=blocked,
                dense_weight=dense_weight if bucket.dense else None,
                memory=memory,
            )

        try:
            replay, beams = self._capture(run)
        except RuntimeError as error:
            raise EngineError(f"The search could not be captured as a CUDA graph for {bucket}: {error}") from error
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[bucket] = CapturedGraph(hidden, mask, buckets, dense_weight, memory, blocked, replay, beams)
        return self._graphs[bucket]


def padded_batch(batch: int) -> int:
    """The next power of two."""
    return _power_of_two(batch)


def _rounded(history: int) -> int:
    return -(-history // HISTORY_MULTIPLE) * HISTORY_MULTIPLE


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def capture_cuda_graph(run: Callable[[], Result], pool: Any) -> tuple[Callable[[], None], Result]:
    """Captures `run` as one CUDA graph; returns its replay and the result, which every replay writes anew.

    `run` runs twice before, on a stream of its own, to do all lazy set-up, which cannot be captured.
    """
    warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph.replay, result
