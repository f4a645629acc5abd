"""The network in eager torch: the runtime of training and tests, and on a GPU what CUDA graphs are captured from."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from serving.network.model import StreamRec
from serving.network.t5 import CrossKeysValues, KeysValues
from serving.types import EncoderAttention

if TYPE_CHECKING:  # FAISS takes a while to import, which only a catalogue with an index should pay
    from serving.items.item_index import ItemIndex

SAMPLED_ITEMS = 2048  # log Z of a million items is off by 0.05 or so; twice as many cost a request 0.2 ms more


class EagerRuntime:
    """Runs a StreamRec as it is. Implements `Runtime`.

    item_tokens: (I, M) int64 by catalogue row; a longer one may take its place, for items that are added. The network
    must be in eval mode while it serves.
    """

    def __init__(
        self,
        network: StreamRec,
        item_tokens: torch.Tensor,
        attention: EncoderAttention,
        item_index: ItemIndex | None = None,
    ) -> None:
        self.network = network
        self.device = item_tokens.device
        self.step_form = network.step_form
        self.attention: EncoderAttention = attention
        self.item_tokens, self.item_index = item_tokens, item_index
        self._items = len(item_tokens)  # the bundle's own
        with torch.no_grad():
            distances = torch.arange(network.t5.config.relative_attention_max_distance, device=self.device)
            self.relative_bias = network.t5.decoder.position_bias(distances[-1:], distances)[:, 0].flip(1)

    @cached_property
    def item_vectors(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.network.item_vectors(self.item_tokens[: self._items])

    @cached_property
    def sampled_items(self) -> torch.Tensor:
        count = min(SAMPLED_ITEMS, self._items)
        with torch.inference_mode(False):
            return torch.arange(count, device=self.device) * self._items // count

    @cached_property
    def item_sample(self) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.vectors_of(self.sampled_items)

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        return self.network.encode(tokens, mask, self.attention, self.item_tokens.shape[1], items)

    def cross_keys_values(
        self, hidden: torch.Tensor, mask: torch.Tensor, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        return self.network.cross_keys_values(hidden, mask, self.item_tokens.shape[1], buckets)

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        return self.network.t5.decode(x, bias, cross, past)

    def first_slots(self, past: KeysValues, count: int) -> KeysValues:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in past]

    def logits(self, hidden: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
        return self.network.t5.logits(hidden, block)

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.network.t5.shared(token)
        return embedding

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.network.step_input(token, state)

    def state(self, hidden_sum: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = self.network.heads.state(hidden_sum)
        return state

    def vectors_of(self, items: torch.Tensor) -> torch.Tensor:
        return self.network.vectors_of(items, self.item_tokens[items])
