"""The arithmetic floor of a search: its matrix products and nothing else, run as fast as a CPU library can.

The rest of a search's cost is all that is not a matrix product: norms, softmax, the constraint, top-k, bookkeeping,
calls. Every layer has its own weights, as in the network, so that weights beyond the CPU's caches are read from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from serving.network.t5 import ModelConfig


@dataclass(frozen=True, slots=True)
class Product:
    """`count` products (m, k) x (k, n). batch: 0 where the right side is a weight, else that many pairs at once."""

    name: str
    count: int
    m: int
    k: int
    n: int
    batch: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.count * max(self.batch, 1) * self.m * self.k * self.n


@dataclass(frozen=True, slots=True)
class Pass:
    """The products of one call of the network."""

    kind: Literal["cross_keys_values", "step", "output", "state"]
    products: tuple[Product, ...]

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)


def rows_per_position(levels: int, steps: int, paths: int, beams: int) -> list[int]:
    """Decoder rows of one request, by position, where the catalogue is large enough to fill every beam.

    One row reads the start token, P rows read the reasoning tokens, K rows every item token but the last.
    """
    return [1] + [paths] * steps + [beams] * (levels - 1)


def products_of_search(
    config: ModelConfig,
    history: int,
    levels: int,
    *,
    batch: int,
    steps: int,
    paths: int,
    beams: int,
    blocks: Sequence[int] | None = None,
) -> list[Pass]:
    """The passes of one search from encoder states of `history` positions each.

    As in the search, a row's query meets the keys of all W rows written so far; a mask selects those of its own prefix.
    blocks: how many ids the output layer scores, by position; None: the whole vocabulary.
    """
    width, inner, layers = config.d_model, config.num_heads * config.d_kv, config.num_decoder_layers
    keys_values = Product("cross keys and values", 2 * layers, batch * history, width, inner)
    passes, written = [Pass("cross_keys_values", (keys_values,))], 0
    for position, count in enumerate(rows_per_position(levels, steps, paths, beams)):
        written += count
        rows, pairs = batch * count, batch * config.num_heads
        passes.append(
            Pass(
                "step",
                (
                    Product("self q, k, v", 3 * layers, rows, width, inner),
                    Product("self scores", layers, count, config.d_kv, written, pairs),
                    Product("self mix", layers, count, written, config.d_kv, pairs),
                    Product("self o", layers, rows, inner, width),
                    Product("cross q", layers, rows, width, inner),
                    Product("cross scores", layers, count, config.d_kv, history, pairs),
                    Product("cross mix", layers, count, history, config.d_kv, pairs),
                    Product("cross o", layers, rows, inner, width),
                    Product("feed forward in", layers, rows, width, config.d_ff),
                    Product("feed forward out", layers, rows, config.d_ff, width),
                ),
            )
        )
        ids = config.vocab_size if blocks is None else blocks[position]
        passes.append(Pass("output", (Product(f"output layer, {ids} ids", 1, rows, width, ids),)))
        if position <= steps:  # s_i is made of every reasoning position
            passes.append(Pass("state", (Product("state", 2, rows, width, width),)))
    return passes


Run = Callable[[], None]


def in_torch(passes: list[Pass], seed: int = 0) -> list[Run]:
    """One function per pass: torch.mm and torch.bmm into preallocated outputs."""
    torch.manual_seed(seed)
    weights: dict[str, list[torch.Tensor]] = {}

    def prepare(product: Product) -> Run:
        if product.batch:
            left = torch.randn(product.batch, product.m, product.k)
            right = torch.randn(product.batch, product.k, product.n)
            out = left.new_empty(product.batch, product.m, product.n)
            pairs = [right] * product.count
            multiply: Callable[..., torch.Tensor] = torch.bmm
        else:
            left, out = torch.randn(product.m, product.k), torch.empty(product.m, product.n)
            if product.name not in weights:
                weights[product.name] = [torch.randn(product.k, product.n) for _ in range(product.count)]
            pairs, multiply = weights[product.name], torch.mm

        def run() -> None:
            for right in pairs:
                multiply(left, right, out=out)

        return run

    return [in_order([prepare(product) for product in one.products]) for one in passes]


def in_order(runs: list[Run]) -> Run:
    """Runs all of them, one after the other."""

    def run() -> None:
        for one in runs:
            one()

    return run


def in_onnx(passes: list[Pass], seed: int = 0) -> list[Run]:
    """One function per pass: ONNX Runtime's MatMul in one session per set of weights, which packs them."""
    rng = np.random.default_rng(seed)
    sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def prepare(one: Pass) -> Run:
        names = tuple(product.name for product in one.products)
        if names not in sessions:
            sessions[names] = _session(one.products, draw)
        session = sessions[names]
        binding = session.io_binding()
        for product in one.products:
            pairs = (product.batch,) if product.batch else ()
            binding.bind_ortvalue_input(product.name, _value(draw(*pairs, product.m, product.k)))
            if product.batch:
                binding.bind_ortvalue_input(f"{product.name} right", _value(draw(*pairs, product.k, product.n)))
            for i in range(product.count):
                out = np.empty((*pairs, product.m, product.n), np.float32)
                binding.bind_ortvalue_output(f"{product.name} {i}", _value(out))
        return lambda: session.run_with_iobinding(binding)

    return [prepare(one) for one in passes]


def _session(products: tuple[Product, ...], draw: Callable[..., np.ndarray]) -> onnxruntime.InferenceSession:
    """Products with free numbers of rows: (m, k) x weight, or (pairs, m, k) x (pairs, k, n)."""
    nodes, inputs, outputs, weights = [], [], [], []

    def free(name: str, axes: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name} axis {axis}" for axis in range(axes)])

    for product in products:
        axes = 3 if product.batch else 2
        inputs.append(free(product.name, axes))
        if product.batch:
            inputs.append(free(f"{product.name} right", axes))
        for i in range(product.count):
            right = f"{product.name} right"
            if not product.batch:
                right = f"{product.name} weight {i}"
                weights.append(numpy_helper.from_array(draw(product.k, product.n), right))
            nodes.append(helper.make_node("MatMul", [product.name, right], [f"{product.name} {i}"]))
            outputs.append(free(f"{product.name} {i}", axes))
    graph = helper.make_graph(nodes, "floor", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Products of two inputs are the same in all layers here: merged as common subexpressions, they would run just once.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
