"""The network as ONNX graphs, built from its weights: the encoder, and one decoder step.

Built here, not exported from torch: an engine starts in a fraction of a second, needs no exporter, and every operator
is chosen. All are standard operators, which cover a T5 since opset 23 (RMSNormalization, Attention with a past), except
one of ONNX Runtime's for int8. Batch, rows and lengths are free dimensions, named by the letters of `serving.types`,
with W = past + Q. A graph contains its weights as float32, of which protobuf allows 2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from serving.network.t5 import T5, Attention, FeedForward, LayerNorm, ModelConfig

OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
INT8_WEIGHT = 63  # largest weight: 7 bits, so that sums of two products fit 16 bits on processors without VNNI
INT8_INPUT, INT8_ZERO = 127, 128


class Graph:
    """A graph under construction. A value is its name; a method that returns one has added the nodes computing it."""

    def __init__(self, config: ModelConfig, int8: bool = False) -> None:
        self.config, self.int8 = config, int8
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, name: str, *shape: int | str) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def caches(self, declare: Callable[..., str], prefix: str, *shape: int | str) -> list[tuple[str, str]]:
        """Declares keys and values of one shape for every decoder layer, as inputs or as outputs."""
        return [
            (declare(f"{prefix}keys_{i}", *shape), declare(f"{prefix}values_{i}", *shape))
            for i in range(self.config.num_decoder_layers)
        ]

    def name(self, value: str, name: str) -> str:
        """Gives a value another name, such as that of an output."""
        return self.op("Identity", value, outputs=[name])  # ONNX Runtime's optimiser removes it

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Adds a node and returns its first output, which gets a name unless `outputs` has one."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs or (name,), name, domain=domain, **attributes))
        return outputs[0] if outputs else name

    def model(self) -> bytes:
        graph = helper.make_graph(self.nodes, "streamrec", self.inputs, self.outputs, self.constants)
        version = helper.find_min_ir_version_for(OPSETS, ignore_unknown=True)
        model: bytes = helper.make_model(graph, opset_imports=OPSETS, ir_version=version).SerializeToString()
        return model

    # The parts of a T5. Shapes as in `serving.network.t5`.

    def linear(self, x: str, weight: torch.Tensor) -> str:
        """x @ weight.T. Shapes: (B, Q, in), weight (out, in) -> (B, Q, out)."""
        matrix = weight.detach().numpy().T
        return self._int8_linear(x, matrix) if self.int8 else self.op("MatMul", x, self.constant(matrix))

    def _int8_linear(self, x: str, matrix: np.ndarray) -> str:
        """The same in 8 bits: weights scaled per output, inputs per row by their largest value.

        Not per tensor as in DynamicQuantizeLinear: an answer must not depend on the other requests of its batch.
        """
        scale = np.maximum(np.abs(matrix).max(0) / INT8_WEIGHT, np.finfo(np.float32).tiny)
        largest = self.op("ReduceMax", self.op("Abs", x), self.constant([-1], np.int64), keepdims=1)
        unit, zero = self.constant(1 / INT8_INPUT), self.constant(INT8_ZERO, np.uint8)
        rounded = self.op("QuantizeLinear", self.op("Div", x, largest), unit, zero)
        weight = self.constant(np.round(matrix / scale), np.int8)
        product = self.op(
            "MatMulIntegerToFloat", rounded, weight, unit, self.constant(scale), zero, domain="com.microsoft"
        )
        return self.op("Mul", product, largest)  # 0 for a row of zeros, whose quantised form is arbitrary

    def norm(self, x: str, layer_norm: LayerNorm) -> str:
        weight = self.constant(layer_norm.weight.detach().numpy())
        return self.op("RMSNormalization", x, weight, axis=-1, epsilon=layer_norm.eps)

    def feed_forward(self, x: str, part: FeedForward) -> str:
        return self.linear(self.op("Relu", self.linear(x, part.wi.weight)), part.wo.weight)

    def self_attention(
        self, x: str, part: Attention, bias: str, past: Sequence[str] = (), present: Sequence[str] = ()
    ) -> str:
        """Attention over `past`, keys and values (B, H, ., d_kv), and over x; `present` names the concatenated ones."""
        query, keys, values = (self.linear(x, projection.weight) for projection in (part.q, part.k, part.v))
        attended = self.op(
            "Attention", query, keys, values, bias, *past, outputs=(f"attended_{len(self.nodes)}", *present),
            scale=1.0, q_num_heads=part.heads, kv_num_heads=part.heads,
        )  # fmt: skip
        return self.linear(attended, part.o.weight)

    def cross_attention(self, x: str, part: Attention, keys: str, values: str, bias: str) -> str:
        """Attention over keys and values (B, S, H * d_kv), the outputs of `cross_keys_values`."""
        query = self.linear(x, part.q.weight)
        attended = self.op(
            "Attention", query, keys, values, bias, scale=1.0, q_num_heads=part.heads, kv_num_heads=part.heads
        )
        return self.linear(attended, part.o.weight)


def encoder(t5: T5) -> bytes:
    """x (B, S, D), bias (B, H, S, S) -> hidden (B, S, D)."""
    config = t5.config
    graph = Graph(config)
    x = graph.input("x", "B", "S", config.d_model)
    bias = graph.input("bias", "B", config.num_heads, "S", "S")
    for block in t5.encoder.blocks:
        attention, feed_forward = block.self_attention, block.feed_forward
        x = graph.op("Add", x, graph.self_attention(graph.norm(x, attention.layer_norm), attention.part, bias))
        x = graph.op("Add", x, graph.feed_forward(graph.norm(x, feed_forward.layer_norm), feed_forward.part))
    graph.name(graph.norm(x, t5.encoder.final_layer_norm), graph.output("hidden", "B", "S", config.d_model))
    return graph.model()


def cross_keys_values(t5: T5) -> bytes:
    """hidden (B, S, D) -> per layer cross_keys_i, cross_values_i (B, S, H * d_kv)."""
    config = t5.config
    graph = Graph(config)
    hidden = graph.input("hidden", "B", "S", config.d_model)
    outputs = graph.caches(graph.output, "cross_", "B", "S", config.num_heads * config.d_kv)
    for block, names in zip(t5.decoder.blocks, outputs, strict=True):
        attention = block.cross_attention.part
        for projection, name in zip((attention.k, attention.v), names, strict=True):
            graph.name(graph.linear(hidden, projection.weight), name)
    return graph.model()


def step(t5: T5, int8: bool, cross_heads: int = 1) -> bytes:
    """One call of the decoder, `T5.decode`. int8: with weights in 8 bits.

    cross_heads: of the cross-attention's bias, 1 where all heads share it (padding alone) or H.

    Inputs, in this order: x (B, Q, D), bias (B, H, Q, W), cross_bias (B, 1 or H, 1, S), per layer cross_keys_i,
    cross_values_i (B, S, H * d_kv), per layer past_keys_i, past_values_i (B, H, W - Q, d_kv). Outputs: per layer
    keys_i, values_i (B, H, W, d_kv), then hidden (B, Q, D).
    """
    config, heads, d_kv = t5.config, t5.config.num_heads, t5.config.d_kv
    graph = Graph(config, int8)
    x = graph.input("x", "B", "Q", config.d_model)
    bias = graph.input("bias", "B", heads, "Q", "W")
    one = graph.constant([1], np.int64)
    per_row = graph.op("Concat", one, one, graph.op("Shape", x, start=1, end=2), one, axis=0)
    # A bias per row, as ONNX Runtime's Attention needs it.
    cross_bias = graph.op("Expand", graph.input("cross_bias", "B", cross_heads, 1, "S"), per_row)
    cross = graph.caches(graph.input, "cross_", "B", "S", heads * d_kv)
    past = graph.caches(graph.input, "past_", "B", heads, "W - Q", d_kv)
    present = graph.caches(graph.output, "", "B", heads, "W", d_kv)
    for i, block in enumerate(t5.decoder.blocks):
        attention, to_history, feed_forward = block.self_attention, block.cross_attention, block.feed_forward
        normed = graph.norm(x, attention.layer_norm)
        x = graph.op("Add", x, graph.self_attention(normed, attention.part, bias, past[i], present[i]))
        normed = graph.norm(x, to_history.layer_norm)
        x = graph.op("Add", x, graph.cross_attention(normed, to_history.part, *cross[i], cross_bias))
        x = graph.op("Add", x, graph.feed_forward(graph.norm(x, feed_forward.layer_norm), feed_forward.part))
    graph.name(graph.norm(x, t5.decoder.final_layer_norm), graph.output("hidden", "B", "Q", config.d_model))
    return graph.model()
