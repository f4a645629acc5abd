"""The small interface every runtime implements: the network's passes, nothing of the search."""

from __future__ import annotations

from typing import Protocol

import torch

from serving.network.t5 import CrossKeysValues, KeysValues
from serving.types import StepForm


class Runtime(Protocol):
    """Runs the network for `serving.search.beam`. Shapes as in `serving.types`."""

    device: torch.device
    step_form: StepForm
    item_tokens: torch.Tensor  # (I, M) int64 by catalogue row
    item_vectors: torch.Tensor  # (I, D), what the dense score compares a state with
    relative_bias: torch.Tensor  # (H, T), the decoder's bias towards a position 0..T - 1 places back

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, S) int64, (B, S) bool -> (B, S, D)."""
        ...

    def cross_keys_values(self, hidden: torch.Tensor, mask: torch.Tensor) -> CrossKeysValues:
        """Cross-attention keys and values, once per history."""
        ...

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor, KeysValues]:
        """(B, Q, D) -> h (B, Q, D), logits (B, Q, V), and the longer past."""
        ...

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """(B, Q) -> (B, Q, D)."""
        ...

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Input of a reasoning step: (B, Q), (B, Q, D) -> (B, Q, D)."""
        ...

    def state(self, hidden_sum: torch.Tensor) -> torch.Tensor:
        """s = MLP_s(sum of decoder outputs): (B, Q, D) -> (B, Q, D)."""
        ...

    def dense(self, state: torch.Tensor) -> torch.Tensor:
        """Log-softmax of the state against every item: (..., D) -> (..., I)."""
        ...
