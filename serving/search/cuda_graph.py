"""Records the whole search, selection included, once per bucket, and replays it: one launch instead of thousands.

A recording is made for exact steps, beams and paths, which decide what an answer is, and for a batch and a history
length that are rounded up, which do not: missing requests and positions are padding that nobody sees. It reads fixed
buffers, so a replay is: copy the inputs in, launch, copy the answer out. A recording that fails is an error; nothing
goes on more slowly in its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch

from serving.errors import EngineError
from serving.items.rules import Blocked
from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.search.beam import search
from serving.types import Beams, SearchSettings

# Recordings kept; the least recently used goes. Each holds its beams' buffers, a few MB at the widest.
MOST_RECORDINGS = 64
# Histories are padded up to a multiple of this: attention over padding is cheap, another recording is not.
HISTORY_STEP = 32

Result = TypeVar("Result")
Record = Callable[[Callable[[], Beams]], tuple[Callable[[], None], Beams]]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a recording is for. blocked: the address of the rules' buffers it reads, and whether it reads lists and
    prepared sets; None where there are no rules.
    """

    batch: int
    history: int
    steps: int
    beam_width: int
    paths: int
    dense: bool
    prior: bool
    blocked: tuple[int, bool, bool] | None


@dataclass(frozen=True, slots=True)
class Recording:
    """Fixed inputs, hidden (B, S, D), mask (B, S), dense_weight (B,), prior (B, I), the launch, and the beams it fills.

    prior: None where no request of the bucket has one, for it is as wide as the catalogue.
    blocked: kept so that the buffers it reads are not given to somebody else, even when the rules have moved on.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    dense_weight: torch.Tensor
    prior: torch.Tensor | None
    blocked: Blocked | None
    replay: Callable[[], None]
    beams: Beams


class RecordedSearch:
    """Answers like `serving.search.beam.search`, from recordings. Not thread-safe: one thread owns the device."""

    def __init__(self, runtime: Runtime, trie: Trie, settings: SearchSettings, record: Record | None = None) -> None:
        self.runtime, self.trie, self.settings = runtime, trie, settings
        self._record = partial(record_cuda, pool=torch.cuda.graph_pool_handle()) if record is None else record
        self._recordings: OrderedDict[Bucket, Recording] = OrderedDict()  # least recently used first

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
        prior: torch.Tensor | None = None,
    ) -> Beams:
        """Shapes: hidden (B, S, D) float, mask (B, S) bool; the rest as in `search`. Raises EngineError.

        blocked has to cover the padded batch: `padded_batch(B)` rows, in buffers that stay where they are.
        """
        batch, history, _ = hidden.shape
        bucket = Bucket(
            padded_batch(batch),
            -(-history // HISTORY_STEP) * HISTORY_STEP,
            steps,
            beam_width,
            paths,
            dense_weight is not None,
            prior is not None,
            None if blocked is None else (blocked.inverted.data_ptr(), *blocked.reads),
        )
        if blocked is not None and len(blocked.own) != bucket.batch:
            raise EngineError(f"The rules cover {len(blocked.own)} requests; pad them to {bucket.batch}.")
        recording = self._recordings.get(bucket) or self._make(bucket, hidden.shape[2], blocked)
        self._recordings.move_to_end(bucket)
        recording.hidden[:batch, :history].copy_(hidden)
        recording.hidden[:batch, history:].zero_()  # masked, but 0 times a NaN of an earlier request is a NaN
        recording.mask[:batch].fill_(False)
        recording.mask[:batch, :history].copy_(mask)
        if dense_weight is not None:
            recording.dense_weight[:batch].copy_(dense_weight)
        if recording.prior is not None and prior is not None:
            recording.prior[:batch].copy_(prior)
        recording.replay()
        # The next replay writes over the beams, so what is handed out is a copy.
        return Beams(*(getattr(recording.beams, field.name)[:batch].clone() for field in fields(Beams)))

    def _make(self, bucket: Bucket, width: int, blocked: Blocked | None) -> Recording:
        device = self.runtime.device
        hidden = torch.zeros(bucket.batch, bucket.history, width, device=device)
        mask = torch.zeros(bucket.batch, bucket.history, dtype=torch.bool, device=device)
        mask[:, 0] = True  # attention of a padded request has something to see: no NaN in its rows
        dense_weight = torch.zeros(bucket.batch, device=device)
        prior = torch.zeros(bucket.batch, len(self.trie.item), device=device) if bucket.prior else None
        settings = replace(self.settings, paths=bucket.paths)

        def run() -> Beams:
            return search(
                self.runtime,
                self.trie,
                settings,
                self.runtime.memory(hidden, mask),
                steps=bucket.steps,
                beam_width=bucket.beam_width,
                blocked=blocked,
                dense_weight=dense_weight if bucket.dense else None,
                prior=prior,
            )

        try:
            replay, beams = self._record(run)
        except RuntimeError as error:
            raise EngineError(f"The search could not be recorded for {bucket}: {error}") from error
        if len(self._recordings) >= MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        self._recordings[bucket] = Recording(hidden, mask, dense_weight, prior, blocked, replay, beams)
        return self._recordings[bucket]


def padded_batch(batch: int) -> int:
    """The next power of two."""
    return 1 << (batch - 1).bit_length()


def record_cuda(run: Callable[[], Result], pool: Any) -> tuple[Callable[[], None], Result]:
    """Captures `run` as one CUDA graph. The first runs, aside, are for what is set up lazily and cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph.replay, result
