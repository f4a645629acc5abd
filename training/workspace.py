"""What every stage works on: the data's split, the semantic IDs as tokens, the network, the search settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from serving.items.events import gap_buckets, time_buckets
from serving.items.histories import history_items, history_tokens
from serving.items.neighbours import Neighbours
from serving.items.trie import Trie, build_trie
from serving.items.vocabulary import END, Vocabulary
from serving.network.eager import EagerRuntime
from serving.network.model import StreamRec
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues, ModelConfig
from serving.search.ranker import Ranker
from serving.types import BundleSettings
from training.config import ModelSettings, RlConfig, RunConfig, StageConfig
from training.data.examples import Examples, Rows, Windows, all_prefixes, all_windows
from training.data.prepare import Split


@dataclass(frozen=True, slots=True)
class Batch:
    """Encoded histories and what followed them.

    cross: the decoder's rows belong to the targets in order. item: (B, T) int64 item rows, on the CPU, like `real`,
    (B, T) bool: False where a row has fewer targets.
    """

    cross: CrossKeysValues
    item: np.ndarray
    real: np.ndarray


@dataclass(slots=True)
class Workspace:
    """What the stages of a run share.

    item_tokens: (I, M) int64, on the network's device, as is their trie. embedding: (I, E) float32, by which stage 1
    finds similar items.
    windows: the same examples packed; None where the encoder cannot serve several prefixes in one pass.
    """

    config: RunConfig
    split: Split
    examples: Examples
    windows: Windows | None
    vocabulary: Vocabulary
    settings: BundleSettings
    item_tokens: torch.Tensor
    item_tokens_np: np.ndarray  # the same on the CPU, where batches are put together
    embedding: np.ndarray
    network: StreamRec
    trie: Trie
    neighbours: Neighbours | None = None

    @property
    def device(self) -> torch.device:
        return self.item_tokens.device

    @property
    def suffix(self) -> tuple[int, ...]:
        return self.settings.suffix_tokens

    def on(self, device: str) -> Workspace:
        """A copy on another device; the network itself is moved."""
        tokens, network = self.item_tokens.to(device), self.network.to(device)
        return replace(self, item_tokens=tokens, network=network, trie=self.trie.to(device))

    def send(self, values: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Part of a batch to the device."""
        return send(torch.as_tensor(values), self.device)

    def with_network(self, network: StreamRec) -> Workspace:
        """A copy with other weights, such as a stage's frozen reference."""
        return replace(self, network=network)

    def stage_config(self, stage: str) -> StageConfig:
        """The settings of a stage, with its number of steps."""
        config = getattr(self.config, stage)
        return config.resolved(len(self.examples)) if isinstance(config, RlConfig) else config

    def draw_steps(self, draws: torch.Generator | None) -> int:
        """The number of reasoning steps of one training step: one of the run's `lengths`."""
        lengths = self.config.lengths or range(1, self.vocabulary.max_steps + 1)
        return lengths[int(torch.randint(0, len(lengths), (), generator=draws))]

    def runtime(self) -> Runtime:
        """Eager torch around the network as it is now, for the serving search. Switches the network to eval mode."""
        return EagerRuntime(self.network.eval(), self.item_tokens, self.settings.attention)

    def ranker(self, runtime: Runtime | None = None) -> Ranker:
        """Full ranking with the network as it is now, the workspace's settings and its item graph."""
        return Ranker.of(runtime or self.runtime(), self.vocabulary, self.settings, self.neighbours)

    def read(self, rows: Rows, index: np.ndarray, targets: int) -> Batch:
        """Encodes rows of examples or windows, with up to so many targets each, with gradient."""
        if isinstance(rows, Examples):
            item = rows.targets(index)[:, None]
            return Batch(self.encode_rows(rows, index), item, np.ones_like(item, dtype=bool))
        per_item = self.item_tokens.shape[1]
        items, real, first = rows.items(index, targets)
        history = self.send(items[:, :-1])
        tokens = self.item_tokens[history].flatten(1)  # (B, S)
        every = torch.ones(1, tokens.shape[1], dtype=torch.bool, device=self.device)  # no target sees the padding
        hidden = self.network.encode(tokens, every, self.settings.attention, per_item, history)
        seconds = rows.seconds_back(index, targets)
        buckets = None if seconds is None else self.send(gap_buckets(seconds))
        return Batch(self.network.prefixes(hidden, first, targets, per_item, buckets), items[:, first:], real)

    def encode_examples(self, examples: Examples, index: np.ndarray) -> CrossKeysValues:
        """Encodes the histories of some examples, with gradient; where training is packed, those that begin together in
        one pass. A row per example, unlike `read`: for losses that compare examples with each other.
        """
        if self.windows is None:
            return self.encode_rows(examples, index)
        start, row = np.unique(examples.start[index], return_inverse=True)
        lengths = examples.target[index] - examples.start[index]
        longest = np.zeros_like(start)
        np.maximum.at(longest, row, lengths)
        shared = [examples.sequence[begin : begin + length] for begin, length in zip(start, longest, strict=True)]
        cross, per_item = self.encode(shared), self.item_tokens.shape[1]
        rows = self.send(row)
        layers = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in cross.layers]
        mask = np.arange(longest.max() * per_item) < (lengths * per_item)[:, None]  # (B, S)
        buckets = self._buckets(examples.times_of(index), mask.shape[1])
        return CrossKeysValues(layers, self.network.history_bias(self.send(mask), per_item, buckets))

    def encode_rows(self, examples: Examples, index: np.ndarray) -> CrossKeysValues:
        """Encodes the histories of some examples, with gradient, each by itself."""
        return self.encode(examples.histories(index), examples.times_of(index))

    def encode(
        self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray | None] | None = None
    ) -> CrossKeysValues:
        """Encodes histories, with gradient, for all that the decoder will do with them. times: of their events."""
        tokens, mask = history_tokens(histories, self.item_tokens_np, self.settings.max_items, self.suffix)
        tokens, mask = self.send(tokens), self.send(mask)
        per_item = self.item_tokens.shape[1]
        items = self.send(history_items(histories, self.settings.max_items)) if self.settings.item_input else None
        hidden = self.network.encode(tokens, mask, self.settings.attention, per_item, items)
        return self.network.cross_keys_values(hidden, mask, per_item, self._buckets(times, tokens.shape[1]))

    def _buckets(self, times: Sequence[np.ndarray | None] | None, width: int) -> torch.Tensor | None:
        return None if times is None else self.send(time_buckets(times, self.settings.max_items, width))


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device; to a GPU without waiting for the work already queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def bundle_settings(model: ModelSettings) -> BundleSettings:
    """Before validation has chosen the number of steps and how the dense score joins."""
    return BundleSettings(
        max_items=model.max_items,
        suffix_tokens=(END,) if model.end_token else (),
        default_steps=0,
        step_form=model.step_form,
        paths=model.paths,
        merge=model.merge,
        temperature=model.temperature,
        dense_weight=0.0,
        attention=model.attention,
        normalise=model.normalise,
        age_bias=model.age_bias,
        time_bias=model.time_bias,
        item_input=model.item_input,
    )


def make_workspace(
    config: RunConfig,
    split: Split,
    codes: np.ndarray,
    sizes: tuple[int, ...],
    embedding: np.ndarray,
    device: torch.device | str = "cpu",
    shared_levels: int = 0,
) -> Workspace:
    """A fresh network for given data and semantic IDs; its weights follow from the seed, whatever the device."""
    model = config.model
    vocabulary = Vocabulary(model.max_steps, sizes, model.reasoning_codes, shared_levels)
    torch.manual_seed(config.seed)
    network = StreamRec(
        ModelConfig(
            vocabulary.size,
            model.d_model,
            model.d_kv,
            model.d_ff,
            model.layers,
            model.layers,
            model.heads,
            model.dropout,
        ),
        len(codes),
        model.step_form,
        bundle_settings(model).ages,
        times=model.time_bias,
        reads_items=model.item_input,
    )
    return workspace_of(config, split, vocabulary, network, vocabulary.tokens_of(codes), embedding, device)


def workspace_of(
    config: RunConfig,
    split: Split,
    vocabulary: Vocabulary,
    network: StreamRec,
    tokens: np.ndarray,
    embedding: np.ndarray,
    device: torch.device | str = "cpu",
) -> Workspace:
    """For a network that there is; it is moved to the device. Shape: tokens (I, M)."""
    model, tokens = config.model, tokens.astype(np.int64)
    times = None
    if model.time_bias and split.train_events is not None:
        times = [np.asarray(events.times, np.float64) for events in split.train_events]
    return Workspace(
        config,
        split,
        all_prefixes(split.train, model.max_items, times),
        all_windows(split.train, model.max_items, times) if model.packed else None,
        vocabulary,
        replace(bundle_settings(model), type_weights=tuple(config.history.type_weights.items())),
        torch.from_numpy(tokens).to(device),
        tokens,
        embedding,
        network.to(device),
        build_trie(tokens, device),
    )
