"""A lean T5 whose weights transformers' T5ForConditionalGeneration opens.

Leaner than transformers' in what it computes, never in what it means: cross-attention keys and values are made once per
history, several beams (or positions) are query rows of one user, and attention weights have no dropout of their own.
Parameter names are T5's, so that one state_dict serves both; `tests/serving/network/test_t5.py` keeps the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from serving.items.vocabulary import END, FIRST_START, PAD
from serving.types import EncoderAttention

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # per layer, each (B, heads, positions, d_kv)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The part of T5's config that varies here. `vocab_size` is V, `d_model` is D, `num_heads` is H."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    dropout_rate: float = 0.1
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def to_transformers(self) -> dict[str, Any]:
        """The contents of `config.json`, with which T5ForConditionalGeneration.from_pretrained opens the folder."""
        return {name.name: getattr(self, name.name) for name in fields(self)} | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
            "pad_token_id": PAD,
            "eos_token_id": END,
            "decoder_start_token_id": FIRST_START,
            "torch_dtype": "float32",
        }

    @staticmethod
    def from_transformers(data: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**{name.name: data[name.name] for name in fields(ModelConfig)})


@dataclass(frozen=True, slots=True)
class CrossKeysValues:
    """What the decoder sees of B histories: cross-attention keys and values per layer, and what is added to its scores.

    bias: (B, 1 or H, 1 or T, S) float, -inf where a row must not attend. T divides the rows Q of a decoder call: the
    first Q / T rows have the first bias, and so on (targets that see different parts of one encoded history).
    """

    layers: KeysValues
    bias: torch.Tensor


class Dropout(nn.Dropout):
    """On a CPU four elements share one random number: drawing one each takes a seventh of the training time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        kept = min(max(round((1 - self.p) * 2**16), 1), 2**16)  # of the values that a random number may have
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        mask = (bits[: x.numel()].view(x.shape) <= kept - 1 - 2**15).to(x.dtype)  # a bound that fits into 16 bits
        return x * mask.mul_(2**16 / kept)


class LayerNorm(nn.Module):
    """T5's: scaled by the root mean square, no mean, no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention without scaling (T5 folds it into the initialisation). Shape: (B, Q, D) -> (B, Q, D)."""

    def __init__(self, config: ModelConfig, relative_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.d_kv = config.num_heads, config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if relative_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, self.d_kv).transpose(1, 2)  # (B, H, Q, d_kv)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = self.split(self.q(x)) @ keys.transpose(-1, -2)  # (B, H, Q, W)
        if bias.shape[2] in (1, scores.shape[2]):
            scores = scores + bias
        else:
            grouped = scores.view(*scores.shape[:2], bias.shape[2], -1, scores.shape[3])  # (B, H, T, Q / T, W)
            scores = (grouped + bias.unsqueeze(3)).flatten(2, 3)
        attended: torch.Tensor = self.o((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Module):
    """Shape: (B, Q, D) -> (B, Q, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.wo(F.relu(self.wi(x)))
        return projected


class Sublayer(nn.Module):
    """Pre-norm residual around one part; the part's attribute name is T5's."""

    def __init__(self, config: ModelConfig, name: str, part: nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)
        self.part_name = name
        self.layer_norm = LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    @property
    def part(self) -> Any:
        return getattr(self, self.part_name)


class Block(nn.Module):
    """One layer. Its sublayers are in the list `layer`, as in T5; the properties name them."""

    def __init__(self, config: ModelConfig, decoder: bool, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Sublayer(config, "SelfAttention", Attention(config, relative_bias=first))])
        if decoder:
            self.layer.append(Sublayer(config, "EncDecAttention", Attention(config, relative_bias=False)))
        self.layer.append(Sublayer(config, "DenseReluDense", FeedForward(config)))

    @property
    def self_attention(self) -> Sublayer:
        return cast(Sublayer, self.layer[0])

    @property
    def cross_attention(self) -> Sublayer:
        """Of a decoder's block."""
        return cast(Sublayer, self.layer[1])

    @property
    def feed_forward(self) -> Sublayer:
        return cast(Sublayer, self.layer[-1])

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor] | None = None,
        cross: tuple[torch.Tensor, torch.Tensor] | None = None,
        cross_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Shapes: x (B, Q, D); bias over past and new positions, broadcastable to (B, H, Q, past + Q)."""
        self_attention, feed_forward = self.self_attention, self.feed_forward
        normed = self_attention.layer_norm(x)
        keys, values = self_attention.part.keys_values(normed)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self_attention.dropout(self_attention.part(normed, keys, values, bias))
        if cross is not None:
            attention = self.cross_attention
            x = x + attention.dropout(attention.part(attention.layer_norm(x), *cross, cross_bias))
        x = x + feed_forward.dropout(feed_forward.part(feed_forward.layer_norm(x)))
        return x, (keys, values)


class Stack(nn.Module):
    """Encoder or decoder."""

    def __init__(self, config: ModelConfig, decoder: bool) -> None:
        super().__init__()
        count = config.num_decoder_layers if decoder else config.num_layers
        self.block = nn.ModuleList([Block(config, decoder, first=i == 0) for i in range(count)])
        self.final_layer_norm = LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)
        self.bidirectional = not decoder
        self.buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance

    @property
    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.block)  # torch types the entries of a ModuleList as Module

    def position_bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """T5's bucketed relative bias. Shapes: positions (Q,), (W,) int64 -> (H, Q, W)."""
        relative = key[None, :] - query[:, None]
        buckets = self.buckets
        if self.bidirectional:
            buckets //= 2
            offset = (relative > 0).long() * buckets
            distance = relative.abs()
        else:
            offset = torch.zeros_like(relative)
            distance = (-relative).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = offset + torch.where(distance < exact, distance, far)
        first = cast(Block, self.block[0]).self_attention.part
        bias: torch.Tensor = first.relative_attention_bias(bucket).permute(2, 0, 1)
        return bias


class T5(nn.Module):
    """Encoder-decoder with tied embeddings: logits = <h_t, e_c> / sqrt(D)  [open: tied; T5's scaling]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initialisation (its factor is 1)."""
        config = self.config
        stds = {"q": (config.d_model * config.d_kv) ** -0.5, "k": config.d_model**-0.5, "v": config.d_model**-0.5,
                "o": (config.num_heads * config.d_kv) ** -0.5, "wi": config.d_model**-0.5, "wo": config.d_ff**-0.5,
                "relative_attention_bias": config.d_model**-0.5, "shared": 1.0}  # fmt: skip
        for name, parameter in self.named_parameters():
            kind = name.split(".")[-2]
            if kind in stds:
                nn.init.normal_(parameter, std=stds[kind])

    def encode(self, x: torch.Tensor, mask: torch.Tensor, attention: EncoderAttention, per_item: int) -> torch.Tensor:
        """Encodes embedded histories. Shapes: x (B, S, D), mask (B, S) bool, real positions -> (B, S, D).

        `causal-by-item`: a token sees its own and earlier items only (`per_item` tokens each, from position 0).
        """
        bias = self.encoder_bias(mask, attention, per_item)
        x = self.encoder.dropout(x)
        for block in self.encoder.blocks:
            x, _ = block(x, bias)
        x = self.encoder.dropout(self.encoder.final_layer_norm(x))
        return x

    def encoder_bias(self, mask: torch.Tensor, attention: EncoderAttention, per_item: int) -> torch.Tensor:
        """Bias of the encoder's attention, -inf where it must not attend. Shape: mask (B, S) -> (B, H, S, S)."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        bias = self.encoder.position_bias(positions, positions) + float_mask(mask)
        if attention == "causal-by-item":
            item = positions // per_item
            bias = bias.masked_fill(item[None, :] > item[:, None], float("-inf"))
        return bias

    def cross_keys_values(self, hidden: torch.Tensor, bias: torch.Tensor) -> CrossKeysValues:
        """Keys and values of the cross-attention, once per history. Shapes: hidden (B, S, D), bias as the result's.

        In T5 the bias masks padding (`float_mask`) and nothing else.
        """
        layers = [block.cross_attention.part.keys_values(hidden) for block in self.decoder.blocks]
        return CrossKeysValues(layers, bias)

    def decode(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        """Runs the decoder over new rows. Shapes: x (B, Q, D), bias -> (B, H, Q, W), W = past and new rows.

        The bias decides what a row attends to: its own prefix has the relative bias, everything else -inf. New rows may
        be successive positions of one sequence or beams at one position. Returns h (B, Q, D) and the longer past.
        """
        x = self.decoder.dropout(x)
        present: KeysValues = []
        for i, block in enumerate(self.decoder.blocks):
            x, keys_values = block(x, bias, past[i] if past else None, cross.layers[i], cross.bias)
            present.append(keys_values)
        return self.decoder.dropout(self.decoder.final_layer_norm(x)), present

    def logits(self, hidden: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
        """Of all ids, or of those in `block`, [first, last + 1). Shape: (..., D) -> (..., V) or (..., C)."""
        weight = self.shared.weight if block is None else self.shared.weight[block[0] : block[1]]
        return F.linear(hidden * self.config.d_model**-0.5, weight)


def float_mask(mask: torch.Tensor) -> torch.Tensor:
    """(A, W) bool -> (A, 1, 1, W) for padding, used as an additive bias of 0 and -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))[:, None, None, :]
