"""Full ranking of many histories with the search that serves: for evaluation, the int8 gate and every experiment.

A `Ranker` holds what stays the same between histories: the runtime, the trie and its rules, the settings, the item
graph. It knows nothing of data sets, targets or metrics, and nothing of requests: `serving/engine.py` answers those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from serving.items.blocked import Blocked
from serving.items.events import time_buckets
from serving.items.histories import history_items, history_tokens
from serving.items.neighbours import Neighbours
from serving.items.rules import RuleBook
from serving.items.trie import Trie, build_trie
from serving.items.vocabulary import Vocabulary
from serving.network.model import dense_logits
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.beam import propose_items, reason, search, search_settings
from serving.search.candidates import known_ahead
from serving.search.memory import MemoryScores, look_up, weighted
from serving.types import NEG_INF, Beams, BundleSettings, EventData, Rules

TOP = 10
# Histories searched together. A CPU gains nothing from more; a GPU would idle between smaller batches.
BATCH_SIZE = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Histories as the search reads them.

    memory: what the item graph says; None where it has no weight.
    """

    cross: CrossKeysValues
    memory: MemoryScores | None


@dataclass(frozen=True, slots=True)
class Ranker:
    """Ranks all items of a catalogue. Change `settings` with `dataclasses.replace`: trie and rules are kept.

    A runtime caches the items' vectors, so new weights need a new runtime and a new ranker.
    """

    runtime: Runtime
    vocabulary: Vocabulary
    settings: BundleSettings
    trie: Trie
    rules: RuleBook
    item_tokens: np.ndarray  # (I, M), the runtime's on the CPU, where batches are put together
    neighbours: Neighbours | None = None

    @staticmethod
    def of(
        runtime: Runtime, vocabulary: Vocabulary, settings: BundleSettings, neighbours: Neighbours | None = None
    ) -> Ranker:
        """A ranker of the runtime's items."""
        item_tokens = runtime.item_tokens.cpu().numpy()
        trie = build_trie(item_tokens, runtime.device)
        return Ranker(runtime, vocabulary, settings, trie, RuleBook(trie), item_tokens, neighbours)

    @torch.inference_mode()
    def rank(
        self,
        histories: Sequence[np.ndarray],
        steps: int,
        beam: int,
        *,
        exclude_seen: bool = False,
        events: Sequence[EventData] | None = None,
    ) -> np.ndarray:
        """The best ten items per history. Shape: (U, 10) int64 catalogue rows, best first, -1 where there are fewer.

        exclude_seen keeps every item of the whole history (not only of the part that the encoder reads) out of the
        search. events: of each history; None: nothing is known of any.
        """
        ranked = np.full((len(histories), TOP), -1, dtype=np.int64)
        for index in self.batches(histories):
            chosen = [histories[i] for i in index]
            with self.rules.blocked(_seen(chosen, exclude_seen)) as blocked:
                beams = self.search(self.encode(chosen, of_some(events, index)), steps, beam, blocked)
            found = beams.items[:, :TOP].cpu().numpy()
            ranked[index, : found.shape[1]] = found
        return ranked

    @torch.inference_mode()
    def rank_by_state(
        self,
        histories: Sequence[np.ndarray],
        steps: int,
        *,
        exclude_seen: bool = False,
        events: Sequence[EventData] | None = None,
    ) -> np.ndarray:
        """The ten items with the highest dense score of the state after the likeliest reasoning: no beam, no trie.

        Shape: (U, 10) int64 catalogue rows, best first, -1 where there are fewer; fewer columns where the catalogue has
        fewer items. exclude_seen, events: as in `rank`.
        """
        parts, order = [], list(self.batches(histories))
        for index in order:
            chosen = [histories[i] for i in index]
            cross = self.encode(chosen, of_some(events, index)).cross
            states = reason(self.runtime, search_settings(self.vocabulary, self.settings), cross, steps).states
            dense = dense_logits(states[:, 0, -1], self.runtime.item_vectors)  # (B, I)
            if exclude_seen:
                dense[np.repeat(np.arange(len(chosen)), list(map(len, chosen))), np.concatenate(chosen)] = NEG_INF
            best = dense.topk(min(TOP, dense.shape[1]))
            parts.append(best.indices.masked_fill(best.values == NEG_INF, -1).cpu().numpy())
        ranked = np.concatenate(parts)
        ranked[np.concatenate(order)] = ranked.copy()
        return ranked

    def batches(self, histories: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Positions of the histories that are searched together: of similar length, to save padding."""
        lengths = [min(len(history), self.settings.max_items) for history in histories]
        by_length = np.argsort(lengths, kind="stable")
        size = BATCH_SIZE[self.runtime.device.type]
        for begin in range(0, len(by_length), size):
            yield by_length[begin : begin + size]

    @torch.inference_mode()
    def encode(self, histories: Sequence[np.ndarray], events: Sequence[EventData] | None = None) -> EncodedBatch:
        """Encodes histories (catalogue rows, oldest first) as one batch. events: as in `rank`."""
        settings, runtime = self.settings, self.runtime
        tokens, mask = history_tokens(histories, self.item_tokens, settings.max_items, settings.suffix_tokens)
        tokens, mask = tokens.to(runtime.device), mask.to(runtime.device)
        memory = None
        if self.neighbours is not None and settings.neighbours_weight:
            found = look_up(self.neighbours, settings, histories, events)
            memory = weighted(found, [settings.neighbours_weight] * len(histories), runtime.device)
        buckets = None
        if settings.time_bias and events is not None:
            times = [each.times for each in events]
            buckets = torch.from_numpy(time_buckets(times, settings.max_items, tokens.shape[1])).to(runtime.device)
        items = history_items(histories, settings.max_items).to(runtime.device) if settings.item_input else None
        hidden = runtime.encode(tokens, mask, items)
        return EncodedBatch(runtime.cross_keys_values(hidden, mask, buckets), memory)

    @torch.inference_mode()
    def propose(
        self,
        histories: Sequence[np.ndarray],
        steps: int,
        beam: int,
        *,
        exclude_seen: bool = False,
        events: Sequence[EventData] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the beam and the memory propose, for fitting a gate: rows, what the network says of each, confidence.

        Shapes: (B, N) int64, (B, N) float32, -inf where there is no item, (B,) float32. See `beam.Proposed`.
        exclude_seen, events: as in `rank`.
        """
        batch, settings = self.encode(histories, events), search_settings(self.vocabulary, self.settings)
        with self.rules.blocked(_seen(histories, exclude_seen)) as blocked:
            ahead = known_ahead(self.runtime, self.trie, settings, blocked, batch.memory, None)
            reasoned = reason(self.runtime, settings, batch.cross, steps, ahead)
            proposed = propose_items(
                self.runtime, self.trie, settings, batch.cross, reasoned, beam, blocked, None, batch.memory
            )
        items = self.trie.item[proposed.found.leaf].long()
        return items.cpu().numpy(), proposed.network.cpu().numpy(), proposed.confidence.cpu().numpy()

    @torch.inference_mode()
    def search(self, batch: EncodedBatch, steps: int, beam: int, blocked: Blocked | None = None) -> Beams:
        """The serving search over an encoded batch."""
        dense_weight = None
        if self.settings.dense_weight:
            rows = batch.cross.bias.shape[0]
            dense_weight = torch.full((rows,), self.settings.dense_weight, device=self.runtime.device)
        return search(
            self.runtime, self.trie, search_settings(self.vocabulary, self.settings), batch.cross,
            steps=steps, beam_width=beam, blocked=blocked, dense_weight=dense_weight,
            memory=batch.memory,
        )  # fmt: skip


def of_some(events: Sequence[EventData] | None, index: np.ndarray) -> list[EventData] | None:
    return None if events is None else [events[i] for i in index]


def _seen(histories: Sequence[np.ndarray], excluded: bool) -> list[Rules]:
    return [Rules(exclude=tuple(history.tolist())) if excluded else Rules() for history in histories]
