"""The interface that every runtime implements: the passes of the network, and nothing of the search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from serving.network.t5 import CrossKeysValues, KeysValues
from serving.types import StepForm

if TYPE_CHECKING:
    from serving.items.item_index import ItemIndex


class Runtime(Protocol):
    """Runs the network for `serving.search.beam`. Shapes as in `serving.types`."""

    device: torch.device
    step_form: StepForm
    item_tokens: torch.Tensor  # (I, M) int64 by catalogue row
    item_index: ItemIndex | None  # of `item_vectors`; None: all of them are compared
    relative_bias: torch.Tensor  # (H, T), the decoder's bias for a position 0..T - 1 positions back

    @property
    def item_vectors(self) -> torch.Tensor:
        """What a state is compared with by the dense score. Made when it is first needed. Shape: (I, D)."""
        ...

    @property
    def sampled_items(self) -> torch.Tensor:
        """Some rows of `item_vectors`, ascending, evenly spread over the catalogue. Shape: (n,) int64."""
        ...

    @property
    def item_sample(self) -> torch.Tensor:
        """The vectors of `sampled_items`. Shape: (n, D)."""
        ...

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes histories. items: see `StreamRec.embed_history`. Shapes: (B, S) int64, (B, S) bool -> (B, S, D)."""
        ...

    def cross_keys_values(
        self, hidden: torch.Tensor, mask: torch.Tensor, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        """Made once per history. Shapes: hidden (B, S, D), mask (B, S) bool; buckets: see `StreamRec.history_bias`."""
        ...

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        """One call of the decoder. Shapes: x (B, Q, D), bias (B, H, Q, W) -> hidden (B, Q, D), new past."""
        ...

    def first_slots(self, past: KeysValues, count: int) -> KeysValues:
        """The past without the rows behind its first `count`."""
        ...

    def logits(self, hidden: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
        """The output layer, for all ids or for those of one block. Shape: (B, Q, D) -> (B, Q, V) or (B, Q, C)."""
        ...

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """Shape: (B, Q) int64 -> (B, Q, D)."""
        ...

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The input of a reasoning step. Shapes: (B, Q) int64, (B, Q, D) -> (B, Q, D)."""
        ...

    def state(self, hidden_sum: torch.Tensor) -> torch.Tensor:
        """s = MLP_s(sum of the decoder's outputs). Shape: (B, Q, D) -> (B, Q, D)."""
        ...

    def vectors_of(self, items: torch.Tensor) -> torch.Tensor:
        """Rows of `item_vectors`. Shape: (B, N) int64 catalogue rows -> (B, N, D)."""
        ...
