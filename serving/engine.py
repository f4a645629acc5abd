"""The engine owns the device: histories to encoder states, states and requests to answers. Called from one thread."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from serving.bundle import Bundle
from serving.errors import BundleError, EngineError
from serving.items.histories import history_tokens
from serving.items.nearest import nearest_items
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.search.beam import find_items, reason
from serving.search.cuda_graph import RecordedSearch, padded_batch
from serving.types import Answer, Beams, EncoderState, Request, Rules, RuntimeName, StateDtype, Trace

NEAREST_ITEMS = 5
# Rules' rows made beforehand for recorded searches, which read fixed buffers: the widest batch that needs no new ones.
RECORDED_ROWS = 64


class Engine:
    """Answers requests with one bundle. Blocking; not thread-safe: one thread calls it.

    runtime: what runs the network; `cuda` replays recorded searches on a GPU. ValueError for a name that does not
    exist, EngineError where there is no GPU, BundleError where the bundle has not passed the gate for int8. threads: of
    the CPU's arithmetic; torch's are set for the whole process (spinning threads slow each other down). state_dtype:
    what encoder states are rounded to as they are made, so that a cached one answers like a fresh one.
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
        self.runtime = _runtime(runtime, bundle, threads)
        trie = build_trie(bundle.catalogue.tokens) if bundle.trie is None else bundle.trie
        self.trie = trie.to(self.runtime.device)
        recorded = self.runtime.device.type == "cuda"
        self.rules = RuleBook(self.trie, bundle.catalogue.members, rows=RECORDED_ROWS if recorded else 1)
        self.recorded = RecordedSearch(self.runtime, self.trie, bundle.search_settings) if recorded else None

    @torch.inference_mode()
    def encode(self, histories: Sequence[Sequence[int]]) -> list[EncoderState]:
        """Reads histories (catalogue rows, oldest first); an empty history is allowed."""
        settings = self.bundle.settings
        tokens, mask = history_tokens(
            histories, self.bundle.catalogue.tokens, settings.max_items, settings.suffix_tokens
        )
        hidden = self.runtime.encode(tokens.to(self.runtime.device), mask.to(self.runtime.device)).cpu()
        rows = (row[real].numpy() for row, real in zip(hidden, mask, strict=True))
        return [EncoderState(row.astype(self.state_dtype)) for row in rows]

    @torch.inference_mode()
    def search(self, requests: Sequence[Request], states: Sequence[EncoderState]) -> list[Answer]:
        """Answers requests that share reasoning_steps, beam_width and paths. `seconds` in an answer are the batch's."""
        started = time.perf_counter()
        known = self._neighbour_scores(requests)
        beams, thought = self._beams(requests, states, known)
        beams = beams.to("cpu")
        if beams.scores.isnan().any():
            raise EngineError("The network's scores are not numbers (NaN); go back to the bundle served before.")
        answers = [self._answer(beams, i, request, known) for i, request in enumerate(requests)]
        seconds = {"reason": thought - started, "decode": time.perf_counter() - thought}
        for answer in answers:
            answer.seconds = dict(seconds)
        return answers

    def _neighbours_weight(self, request: Request) -> float:
        return self.bundle.neighbours_weight if request.neighbours_weight is None else request.neighbours_weight

    def _neighbour_scores(self, requests: Sequence[Request]) -> np.ndarray | None:
        """log scores by neighbours, (B, I) float32; None where there are none, or nobody asks for them."""
        neighbours = self.bundle.neighbours
        if neighbours is None or not any(self._neighbours_weight(r) or r.explain for r in requests):
            return None
        return neighbours.log_scores([request.history for request in requests], self.bundle.max_items)

    def _beams(
        self, requests: Sequence[Request], states: Sequence[EncoderState], known: np.ndarray | None
    ) -> tuple[Beams, float]:
        """The search, and when its reasoning was done; a recorded search is one piece, all of it counts as decode."""
        first, device = requests[0], self.runtime.device
        settings = self.bundle.search_settings
        if first.paths is not None:
            settings = replace(settings, paths=first.paths)
        weights = [self.bundle.dense_weight if r.dense_weight is None else r.dense_weight for r in requests]
        dense = torch.tensor(weights, device=device) if any(weights) or any(r.explain for r in requests) else None
        prior = None
        by_neighbours = np.array([[self._neighbours_weight(request)] for request in requests], dtype=np.float32)
        if known is not None and by_neighbours.any():
            prior = torch.from_numpy(by_neighbours * known).to(device)
        hidden, mask = (part.to(device) for part in _pad(states))
        rules = [request.rules for request in requests]
        if self.recorded is not None:
            thought = time.perf_counter()
            rules += [Rules()] * (padded_batch(len(requests)) - len(requests))
            with self.rules.blocked(rules) as blocked:
                return self.recorded.search(
                    hidden, mask, steps=first.reasoning_steps, beam_width=first.beam_width, paths=settings.paths,
                    blocked=blocked, dense_weight=dense, prior=prior,
                ), thought  # fmt: skip
        memory = self.runtime.memory(hidden, mask)
        reasoned = reason(self.runtime, settings, memory, first.reasoning_steps)
        thought = time.perf_counter()
        with self.rules.blocked(rules) as blocked:
            beams = find_items(
                self.runtime, self.trie, settings, memory, reasoned, first.beam_width, blocked, dense, prior
            )
        return beams, thought

    def warm_up(self) -> None:
        """Runs real shapes once, so that the first request does not pay for allocation and lazy set-up."""
        catalogue = self.bundle.catalogue
        subsets = [Rules(catalogue=name) for name in catalogue.subsets]
        self.rules.prepare([*subsets, *(Rules(categories=(name,)) for name in sorted(catalogue.category_names))])
        history = tuple(range(min(len(self.bundle.catalogue), self.bundle.max_items)))
        state = self.encode([history])
        for steps in range(self.bundle.max_steps + 1):
            self.search([Request(history, k=10, beam_width=50, reasoning_steps=steps)], state)

    def _answer(self, beams: Beams, i: int, request: Request, known: np.ndarray | None) -> Answer:
        found = beams.items[i] >= 0
        items = beams.items[i][found][: request.k].tolist()
        scores = beams.scores[i][found][: request.k].tolist()
        by_neighbours = [] if known is None else known[i, items].tolist()
        return Answer(items, scores, trace=self._trace(beams, i, items, by_neighbours) if request.explain else None)

    def _trace(self, beams: Beams, i: int, items: list[int], neighbour_scores: list[float]) -> Trace:
        path = int(beams.path[i, 0])
        states = beams.states[i, path].to(self.runtime.device)  # (L + 1, D)
        vectors = self.runtime.item_vectors
        count = len(items)
        similarity = F.cosine_similarity(vectors[items].unsqueeze(1), states.unsqueeze(0), dim=-1)
        return Trace(
            reasoning_tokens=beams.reasoning_tokens[i, path].tolist(),
            reasoning_log_probs=beams.reasoning_log_probs[i, path].tolist(),
            nearest_items=nearest_items(states, vectors, NEAREST_ITEMS).tolist(),
            token_log_probs=beams.token_log_probs[i, :count].tolist(),
            dense_scores=beams.dense[i, :count].tolist(),
            neighbour_scores=neighbour_scores,
            similarity=similarity.tolist(),
        )


def _runtime(name: RuntimeName, bundle: Bundle, threads: int) -> EagerRuntime:
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    if name == "eager":
        return EagerRuntime(bundle.network, tokens, bundle.settings.attention)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("There is no CUDA device here; choose the runtime onnx or eager.")
        return EagerRuntime(copy.deepcopy(bundle.network).cuda(), tokens.cuda(), bundle.settings.attention)
    if name not in ("onnx", "onnx-int8"):
        raise ValueError(f"There is no runtime {name!r}; choose eager, onnx, onnx-int8 or cuda.")
    if name == "onnx-int8" and (bundle.int8 or {}).get("passed") is not True:
        known = "has not passed" if bundle.int8 else "was exported without"
        raise BundleError(f"The bundle {bundle.name} {known} the gate for int8; serve it with the runtime onnx.")
    from serving.network.onnx import OnnxRuntime  # half a second to import, for those alone who choose it

    return OnnxRuntime(bundle.network, tokens, bundle.settings.attention, threads=threads, int8=name == "onnx-int8")


def _pad(states: Sequence[EncoderState]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of one batch, padded to the longest. Shapes: (B, S, D) float32, (B, S) bool."""
    lengths = [len(state.hidden) for state in states]
    hidden = np.zeros((len(states), max(lengths), states[0].hidden.shape[1]), dtype=np.float32)
    for i, state in enumerate(states):
        hidden[i, : lengths[i]] = state.hidden
    mask = np.arange(max(lengths))[None, :] < np.asarray(lengths)[:, None]
    return torch.from_numpy(hidden), torch.from_numpy(mask)
