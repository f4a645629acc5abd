"""The engine owns the device: it encodes histories, and answers requests from encoded histories."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from serving.bundle import Bundle
from serving.errors import BundleError, EngineError, RequestError
from serving.items.events import time_buckets
from serving.items.histories import history_items, history_tokens
from serving.items.live import LiveIndex
from serving.items.nearest import nearest_items
from serving.items.neighbours import NO_ITEM
from serving.items.rules import RuleBook, SetsInUse
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.search.beam import rank_items, reason, search
from serving.search.cuda_graph import GraphSearch, padded_batch
from serving.search.memory import LookedUp, look_up, weighted
from serving.types import Answer, Beams, EncoderState, Request, Rules, RuntimeName, StateDtype, Trace

NEAREST_ITEMS = 5
# Rows of rules allocated ahead for CUDA graphs, which read fixed buffers: the widest batch that needs no new ones.
GRAPH_RULE_ROWS = 64
# Items that may be added before the index has to be built again: at least so many, or this share of the catalogue.
LEAST_ROOM = 1024
ROOM_SHARE = 0.25


class Engine:
    """Answers requests with one bundle. Blocking, and not thread-safe: one thread calls it.

    runtime: what runs the network; `cuda` replays captured searches on a GPU. threads: of the CPU's arithmetic; torch's
    are set for the whole process. state_dtype: encoder states are rounded to it as soon as they are made, so that a
    cached one answers exactly like a fresh one.

    Raises ValueError for an unknown runtime, EngineError without a GPU for `cuda`, and BundleError if the bundle has
    not passed the int8 gate for `onnx-int8`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        runtime: RuntimeName = "eager",
        threads: int = 1,
        state_dtype: StateDtype = "float32",
    ) -> None:
        torch.set_num_threads(threads)
        self.bundle, self.state_dtype = bundle, state_dtype
        self._settings = bundle.search_settings  # made anew each time, which takes 2% of a small search
        self.runtime = _runtime(runtime, bundle, threads)
        trie = build_trie(bundle.catalogue.tokens) if bundle.trie is None else bundle.trie
        self.trie = trie.to(self.runtime.device)
        self._on_gpu = self.runtime.device.type == "cuda"
        self._rule_rows = GRAPH_RULE_ROWS if self._on_gpu else 1
        self.rules = RuleBook(self.trie, bundle.catalogue.sets, rows=self._rule_rows)
        self.graphs = GraphSearch(self.runtime, self.trie, self._settings) if self._on_gpu else None
        self._index: LiveIndex | None = None  # once the catalogue has changed
        self._changed: list[int] = []  # since `with_room` was called

    @torch.inference_mode()
    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]:
        """Encodes histories (catalogue rows, oldest first); an empty history is allowed. Raises RequestError."""
        settings = self.bundle.settings
        tokens, mask = history_tokens(
            histories, self.bundle.catalogue.tokens, settings.max_items, settings.suffix_tokens
        )
        device = self.runtime.device
        items = history_items(histories, settings.max_items).to(device) if settings.item_input else None
        hidden = self.runtime.encode(tokens.to(device), mask.to(device), items).cpu()
        rows = (row[real].numpy() for row, real in zip(hidden, mask, strict=True))
        return [EncoderState(row.astype(self.state_dtype)) for row in rows]

    @torch.inference_mode()
    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]:
        """Answers requests that share reasoning_steps, beam_width and paths, and either all or none of which name
        items and explore. An answer's `seconds` are the batch's. An item that no search can find is not in an answer.

        An answer to a request that explores has more than k items: behind those follow up to `explore` new ones."""
        if requests[0].explore:
            return self._explore(requests, states)
        started = time.perf_counter()
        found = self._look_up(requests)
        try:
            beams, reasoned_at = self._search(requests, states, found)
        except SetsInUse:
            if len(requests) == 1:
                raise RequestError("This catalogue is too large for so many boosts; name fewer.", "boost") from None
            half = len(requests) // 2
            return self.search(requests[:half], states[:half]) + self.search(requests[half:], states[half:])
        beams = beams.to("cpu")
        if (beams.scores.isnan() | (beams.scores.isinf() & (beams.items >= 0))).any():
            raise EngineError("The network's scores are not finite numbers; go back to the bundle served before.")
        answers = [self._answer(beams, i, request, found) for i, request in enumerate(requests)]
        seconds = {"reason": reasoned_at - started, "decode": time.perf_counter() - reasoned_at}
        for answer in answers:
            answer.seconds = dict(seconds)
        return answers

    def _explore(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]:
        ordinary = [replace(request, explore=0) for request in requests]
        new_only = [replace(r, k=r.explore, rules=replace(r.rules, new_only=True), explore=0) for r in requests]
        found = self.search([*ordinary, *new_only], [*states, *states])
        return [answer.followed_by(new) for answer, new in zip(found, found[len(requests) :], strict=False)]

    def warm_up(self) -> None:
        """Runs real shapes once, so that the first request does not pay for allocation and lazy set-up."""
        catalogue = self.bundle.catalogue
        subsets = [Rules(catalogue=name) for name in catalogue.subsets]
        categories = [Rules(categories=(name,)) for name in sorted(catalogue.category_names)]
        self.rules.prepare([*subsets, *categories, Rules(new_only=True)])
        history = tuple(range(min(len(self.bundle.catalogue), self.bundle.max_items)))
        state = self.encode([history])
        for steps in range(self.bundle.max_steps + 1):
            self.search([Request(history, k=10, beam_width=50, reasoning_steps=steps)], state)

    # A catalogue that changes

    @property
    def room(self) -> float:
        """How much of the room for more items is left, 0..1."""
        return 0.0 if self._index is None else self._index.room

    def refresh(self, rows: Sequence[int]) -> list[int]:
        """Brings searches in line with the catalogue for these rows. Returns those for which there is no room.

        A row without room goes on as before until an index with room is adopted."""
        self._changed += rows
        return list(rows) if self._index is None else self._index.refresh(rows)

    def with_room(self) -> LiveIndex:
        """An index of the catalogue as it is, with room for more. For another thread: the engine answers meanwhile."""
        self._changed = []
        return LiveIndex(
            self.bundle.catalogue,
            self.bundle.vocabulary.level_ranges,
            room=max(LEAST_ROOM, int(ROOM_SHARE * len(self.bundle.catalogue))),
            device=self.runtime.device,
            rule_rows=self._rule_rows,
            prepared=self.rules.sets.prepared()[1:],
        )

    def adopt(self, index: LiveIndex) -> list[int]:
        """From now on searches read this index. Returns what `refresh` does, for what has changed meanwhile."""
        self._index, self.trie, self.rules = index, index.trie, index.rules
        self.runtime.item_tokens = index.item_tokens
        if self.graphs is not None:  # the graphs there are read the buffers of before
            self.graphs = GraphSearch(self.runtime, self.trie, self._settings)
        return index.refresh(self._changed)

    def _search(
        self, requests: Sequence[Request], states: Sequence[EncoderState], found: LookedUp | None
    ) -> tuple[Beams, float]:
        """The beams, and when reasoning was done; a graph is a single launch, and all of it counts as decoding."""
        first, device = requests[0], self.runtime.device
        settings = self._settings
        if first.paths is not None:
            settings = replace(settings, paths=first.paths)
        dense_weight = self._dense_weight(requests)
        weights = [self._neighbours_weight(request) for request in requests]
        memory = None if found is None else weighted(found, weights, device)
        hidden, mask = (part.to(device) for part in _pad(states))
        buckets = None
        if self.bundle.settings.time_bias:
            times = [None if request.events is None else request.events.times for request in requests]
            buckets = torch.from_numpy(time_buckets(times, self.bundle.max_items, hidden.shape[1])).to(device)
        rules = [request.rules for request in requests]
        boosts = self.rules.boosts([request.boosts for request in requests])
        if self.graphs is not None and first.items is None and boosts is None:
            reasoned_at = time.perf_counter()
            rules += [Rules()] * (padded_batch(len(requests)) - len(requests))
            with self.rules.blocked(rules) as blocked:
                return self.graphs.search(
                    hidden, mask, steps=first.reasoning_steps, beam_width=first.beam_width, paths=settings.paths,
                    blocked=blocked, dense_weight=dense_weight, memory=memory, buckets=buckets,
                ), reasoned_at  # fmt: skip
        cross = self.runtime.cross_keys_values(hidden, mask, buckets)
        if first.items is not None:
            reasoned, reasoned_at = reason(self.runtime, settings, cross, first.reasoning_steps), time.perf_counter()
            items = self._padded([request.items or () for request in requests])
            beams = rank_items(self.runtime, self.trie, settings, cross, reasoned, items, dense_weight, memory, boosts)
            return beams, reasoned_at
        reasoned_ats = list[float]()
        with self.rules.blocked(rules) as blocked:
            beams = search(
                self.runtime, self.trie, settings, cross, steps=first.reasoning_steps, beam_width=first.beam_width,
                blocked=blocked, dense_weight=dense_weight, memory=memory, boosts=boosts,
                on_reasoned=lambda: reasoned_ats.append(time.perf_counter()),
            )  # fmt: skip
        return beams, reasoned_ats[0]

    def _padded(self, lists: Sequence[Sequence[int]]) -> torch.Tensor:
        """Catalogue rows on the device, with NO_ITEM behind the shorter lists. Shape: (B, U) int64, U > 0."""
        padded = np.full((len(lists), max(1, *map(len, lists))), NO_ITEM, np.int64)
        for i, rows in enumerate(lists):
            padded[i, : len(rows)] = rows
        return torch.from_numpy(padded).to(self.runtime.device)

    def _dense_weight(self, requests: Sequence[Request]) -> torch.Tensor | None:
        """Shape: (B,) float32; None if no request needs the dense score."""
        weights = [self.bundle.dense_weight if r.dense_weight is None else r.dense_weight for r in requests]
        if not any(weights) and not any(request.explain for request in requests):
            return None
        return torch.tensor(weights, device=self.runtime.device)

    def _neighbours_weight(self, request: Request) -> float:
        return self.bundle.neighbours_weight if request.neighbours_weight is None else request.neighbours_weight

    def _look_up(self, requests: Sequence[Request]) -> LookedUp | None:
        """What the item graph says of the histories; None if the bundle has none or no request needs it."""
        neighbours = self.bundle.neighbours
        if neighbours is None or not any(self._neighbours_weight(r) or r.explain for r in requests):
            return None
        events = [request.events for request in requests]
        histories = [request.history for request in requests]
        return look_up(neighbours, self.bundle.settings, histories, events if any(events) else None)

    def _answer(self, beams: Beams, i: int, request: Request, found: LookedUp | None) -> Answer:
        rows = beams.items[i, : request.k].tolist()
        items = rows[: rows.index(-1)] if -1 in rows else rows  # beams that are no item come last
        scores = beams.scores[i, : len(items)].tolist()
        return Answer(items, scores, trace=self._trace(beams, i, items, found) if request.explain else None)

    def _trace(self, beams: Beams, i: int, items: list[int], found: LookedUp | None) -> Trace:
        path = int(beams.path[i, 0])
        states = beams.states[i, path].to(self.runtime.device)  # (L + 1, D)
        count = len(items)
        vectors = self.runtime.vectors_of(torch.tensor(items, dtype=torch.int64, device=self.runtime.device))
        similarity = F.cosine_similarity(vectors.unsqueeze(1), states.unsqueeze(0), dim=-1)
        return Trace(
            reasoning_tokens=beams.reasoning_tokens[i, path].tolist(),
            reasoning_log_probs=beams.reasoning_log_probs[i, path].tolist(),
            nearest_items=self._nearest_items(states),
            token_log_probs=beams.token_log_probs[i, :count].tolist(),
            dense_scores=beams.dense[i, :count].tolist(),
            neighbour_scores=[] if found is None else found.explained(i, items),
            gate=None if found is None or found.gate is None else float(beams.gate[i].sigmoid()),
            similarity=similarity.tolist(),
        )

    def _nearest_items(self, states: torch.Tensor) -> list[list[int]]:
        """The items with the highest dense score, per state. Shape: states (L + 1, D)."""
        catalogue = self.bundle.catalogue
        if self.runtime.item_index is None:
            vectors, rows = self.runtime.item_vectors, catalogue.listed_rows()
            own = torch.from_numpy(rows[rows < len(vectors)]).to(vectors.device)
            nearest = nearest_items(states, vectors if len(own) == len(vectors) else vectors[own], NEAREST_ITEMS)
            return own[nearest].tolist()
        nearest, _ = self.runtime.item_index.search(states, NEAREST_ITEMS, self.runtime.vectors_of)
        return [[row for row in rows if row >= 0 and catalogue.listed[row]] for rows in nearest.tolist()]


def _runtime(name: RuntimeName, bundle: Bundle, threads: int) -> EagerRuntime:
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    if name == "eager":
        return EagerRuntime(bundle.network, tokens, bundle.settings.attention, bundle.item_index)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("There is no CUDA device here; choose the runtime onnx or eager.")
        return EagerRuntime(copy.deepcopy(bundle.network).cuda(), tokens.cuda(), bundle.settings.attention)
    if name not in ("onnx", "onnx-int8"):
        raise ValueError(f"There is no runtime {name!r}; choose eager, onnx, onnx-int8 or cuda.")
    if name == "onnx-int8" and (bundle.int8 or {}).get("passed") is not True:
        known = "has not passed" if bundle.int8 else "was exported without"
        raise BundleError(f"The bundle {bundle.name} {known} the gate for int8; serve it with the runtime onnx.")
    from serving.network.onnx import OnnxRuntime  # takes half a second to import, which only its users should pay

    return OnnxRuntime(
        bundle.network, tokens, bundle.settings.attention, bundle.item_index, threads=threads, int8=name == "onnx-int8"
    )


def _pad(states: Sequence[EncoderState]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of one batch, padded to the longest. Shapes: (B, S, D) float32, (B, S) bool."""
    lengths = [len(state.hidden) for state in states]
    hidden = np.zeros((len(states), max(lengths), states[0].hidden.shape[1]), dtype=np.float32)
    for i, state in enumerate(states):
        hidden[i, : lengths[i]] = state.hidden
    mask = np.arange(max(lengths))[None, :] < np.asarray(lengths)[:, None]
    return torch.from_numpy(hidden), torch.from_numpy(mask)
