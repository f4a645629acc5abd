"""The network: a T5 and the heads of the method."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from serving.items.events import TIME_BUCKETS
from serving.network.t5 import T5, CrossKeysValues, ModelConfig, float_mask
from serving.types import Ages, EncoderAttention, StepForm

NO_AGES = Ages()
FORGOTTEN = 0.1  # share of a history's items


class Heads(nn.Module):
    """The method's MLPs, the feedback of the state, and the items' dense vectors.

    state      s_i = MLP_s(sum_{j<=i} d_j)                 [paper, stage 2]
    residual   r_i = MLP_r(t - s_{i-1})                    [paper, stage 2]
    feedback   input of step i gets W s_{i-1}              [open: continuous thinking, zero at the start]
    item_free  v = sum of the item's token embeddings + a free vector   [open: what the dense score compares with]
    item_input the encoder's input of each of an item's tokens also gets a vector of the item, zero at the start
               [open: only where `reads_items`]. Its tokens tell an item apart only together; with this, attention
               sees which item it is at once.
    age_bias   the decoder's cross-attention scores of an item get b[age, head], its newest item has age 0
               [open: so that a packed encoder pass can serve all prefixes; only where `ages` > 0]. It begins as ALiBi
               (Press et al. 2022), -age / 2^head: from zeros, what is recent takes hundreds of steps to be found.
    time_bias  they also get b[bucket of the time from an item's event to the newest, head], zero at the start
               [open: only where `times`]
    """

    def __init__(self, width: int, items: int, ages: int, heads: int, *, times: bool, reads_items: bool) -> None:
        super().__init__()
        self.state = _mlp(width)
        self.residual = _mlp(width)
        self.feedback = nn.Linear(width, width, bias=False)
        self.item_free = _zeros(items, width)
        if reads_items:
            self.item_input = _zeros(items, width)
        nn.init.zeros_(self.feedback.weight)
        if ages:
            self.age_bias = nn.Embedding(ages, heads)
            with torch.no_grad():
                self.age_bias.weight.copy_(-torch.arange(ages)[:, None] * 0.5 ** torch.arange(heads))
        if times:
            self.time_bias = nn.Embedding(TIME_BUCKETS, heads)
            nn.init.zeros_(self.time_bias.weight)


class StreamRec(nn.Module):
    """T5 and heads together, with what needs both: the input of a reasoning step and the vectors of items.

    ages: what the cross-attention knows of the age of a history's items. times: whether it tells apart how long before
    the newest event each was. reads_items: whether the encoder reads vectors of the items beside their tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        items: int,
        step_form: StepForm,
        ages: Ages = NO_AGES,
        *,
        times: bool = False,
        reads_items: bool = False,
    ) -> None:
        super().__init__()
        self.t5 = T5(config)
        self.heads = Heads(config.d_model, items, ages.number, config.num_heads, times=times, reads_items=reads_items)
        self.step_form = step_form
        self.ages, self.times, self.reads_items = ages, times, reads_items

    def embed_history(self, tokens: torch.Tensor, items: torch.Tensor | None, per_item: int) -> torch.Tensor:
        """The encoder's input. items: of the tokens, for a network that reads them; others ignore them.

        While training, FORGOTTEN of the items are read by their tokens alone, as one is that comes after training.
        Shapes: tokens (B, S) int64, items (B, n) int64 catalogue rows, oldest first, -1 = none -> (B, S, D).
        """
        x: torch.Tensor = self.t5.shared(tokens)
        if not self.reads_items:
            return x
        assert items is not None
        table = self.heads.item_input
        known = (items >= 0) & (items < table.num_embeddings)
        if self.training:
            known &= torch.rand(items.shape, device=items.device) >= FORGOTTEN
        vectors = table(items.clamp(0, table.num_embeddings - 1)) * known.unsqueeze(-1)
        vectors = vectors.repeat_interleave(per_item, 1)
        return x + F.pad(vectors, (0, 0, 0, x.shape[1] - vectors.shape[1]))

    def encode(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        attention: EncoderAttention,
        per_item: int,
        items: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes histories. Shapes: mask (B, S) bool, real positions; tokens and items as above -> (B, S, D)."""
        return self.t5.encode(self.embed_history(tokens, items, per_item), mask, attention, per_item)

    def step_input(self, token: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The decoder's input for a reasoning step: the token o_i, the fed-back state s_{i-1}, or both.

        Shapes: token (B, Q) int64, state (B, Q, D) -> (B, Q, D).
        """
        step: torch.Tensor
        if self.step_form == "token":
            step = self.t5.shared(token)
        elif self.step_form == "state":
            step = self.heads.feedback(state)
        else:
            step = self.t5.shared(token) + self.heads.feedback(state)
        return step

    def cross_keys_values(
        self, hidden: torch.Tensor, mask: torch.Tensor, per_item: int, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        """What the decoder sees of encoded histories. Shapes: hidden (B, S, D), mask (B, S) bool, buckets as below."""
        return self.t5.cross_keys_values(hidden, self.history_bias(mask, per_item, buckets))

    def history_bias(self, mask: torch.Tensor, per_item: int, buckets: torch.Tensor | None = None) -> torch.Tensor:
        """Bias of the cross-attention: -inf for padding, and by the age of a position's item where there are ages.

        What comes after the items (`suffix_tokens`) has age 0. buckets: of times (`serving/items/events.py`), which
        only a network with `times` reads; None: all are unknown, which is the same for all items and so says nothing.
        Shapes: mask (B, S) bool, real positions; per_item tokens an item; buckets (B, S) int64, one an item, then 0
        -> (B, 1 or H, 1, S).
        """
        bias = float_mask(mask)
        item = torch.arange(mask.shape[1], device=mask.device) // per_item
        if self.ages.number:
            newest = (mask.sum(1, keepdim=True) - self.ages.suffix) // per_item - 1
            bias = bias + self.bias_of_age(newest - item).unsqueeze(2)
        if self.times:
            of_position = torch.zeros_like(mask, dtype=torch.int64) if buckets is None else buckets[:, item]
            bias = bias + self.bias_of_time(of_position).unsqueeze(2)
        return bias

    def prefixes(
        self, hidden: torch.Tensor, first: int, targets: int, per_item: int, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        """What the decoder sees of `targets` prefixes of each encoded history, the shortest of `first` items.

        The encoder must be causal by item. buckets: of the time from each item to the newest of each prefix.
        Shapes: hidden (B, S, D), buckets (B, targets, S / per_item); the decoder's rows belong to the prefixes in
        order.
        """
        item = torch.arange(hidden.shape[1], device=hidden.device) // per_item
        newest = torch.arange(first - 1, first - 1 + targets, device=hidden.device)
        age = newest[:, None] - item  # (T, S)
        bias = self.bias_of_age(age.unsqueeze(0))
        if self.times and buckets is not None:
            bias = bias + self.bias_of_time(buckets).repeat_interleave(per_item, -1)
        bias = bias.masked_fill(age < 0, float("-inf"))
        return self.t5.cross_keys_values(hidden, bias.expand(len(hidden), -1, -1, -1))

    def bias_of_age(self, age: torch.Tensor) -> torch.Tensor:
        """Shape: (B, ...) int64, cut to the ages that it knows -> (B, H, ...)."""
        bias: torch.Tensor = self.heads.age_bias(age.clamp(0, self.ages.number - 1))
        return bias.movedim(-1, 1)

    def bias_of_time(self, bucket: torch.Tensor) -> torch.Tensor:
        """Shape: (B, ...) int64 -> (B, H, ...)."""
        bias: torch.Tensor = self.heads.time_bias(bucket)
        return bias.movedim(-1, 1)

    def item_vectors(self, item_tokens: torch.Tensor) -> torch.Tensor:
        """v of every item. Shapes: (I, M) int64 -> (I, D)."""
        vectors: torch.Tensor = self.t5.shared(item_tokens).sum(1) + self.heads.item_free.weight
        return vectors

    def vectors_of(self, items: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """v of some items; one that came after training has no free vector.

        Shapes: catalogue rows (...) int64, their tokens (..., M) -> (..., D).
        """
        trained = self.heads.item_free.num_embeddings
        free = self.heads.item_free(items.clamp(max=trained - 1)).masked_fill((items >= trained).unsqueeze(-1), 0)
        vectors: torch.Tensor = self.t5.shared(tokens).sum(-2) + free
        return vectors


def dense_logits(state: torch.Tensor, item_vectors: torch.Tensor) -> torch.Tensor:
    """<s, v_i> / sqrt(D), the state against every item. Shapes: (..., D), (I, D) -> (..., I)."""
    return F.linear(state * state.shape[-1] ** -0.5, item_vectors)


def _zeros(items: int, width: int) -> nn.Embedding:
    """numpy's zeros take neither memory nor time until they are written to, which a bundle's weights replace before."""
    zeros = torch.from_numpy(np.zeros((items, width), np.float32))
    table: nn.Embedding = nn.Embedding.from_pretrained(zeros, freeze=False)  # type: ignore[no-untyped-call]
    return table


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
