"""The network on ONNX Runtime, for serving on a CPU: the answers of eager torch in about half the time.

The encoder, the keys and values of the cross-attention and the decoder step are ONNX graphs; the rest (embeddings,
position bias, the output layer, of which a position needs one block only, the method's heads) is eager torch. There is
no CUDA here: on a GPU the search, eager step included, is captured as one graph, which leaves nothing for another
runtime to save. `python -m benchmarks.engine.steps` compares this decoder step with other ways to run it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

# Set before the import: official builds send telemetry about every session, and store an identifier of the machine for
# it. Older and newer releases have different names for the switch.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}

import numpy as np
import onnxruntime
import torch

from serving.network import onnx_graph
from serving.network.eager import EagerRuntime
from serving.network.model import StreamRec
from serving.network.t5 import CrossKeysValues, KeysValues
from serving.types import EncoderAttention

if TYPE_CHECKING:
    from serving.items.item_index import ItemIndex


class OnnxRuntime(EagerRuntime):
    """Runs a StreamRec with its weights as they are at construction. Implements `Runtime`.

    threads: of ONNX Runtime's arithmetic. int8: the weights of the decoder step in 8 bits. The encoder stays float32,
    so that an encoder state is the same whichever runtime made it, and runtimes can share a cache; so does the output
    layer.

    Nothing is copied: torch, numpy and ONNX Runtime share the same buffers. What the search only passes on, the past
    and `CrossKeysValues.layers`, stays a flat list of arrays (keys, values, layer by layer): making tensors of them
    cost 5% of a search.
    """

    def __init__(
        self,
        network: StreamRec,
        item_tokens: torch.Tensor,
        attention: EncoderAttention,
        item_index: ItemIndex | None = None,
        *,
        threads: int = 1,
        int8: bool = False,
    ) -> None:
        super().__init__(network, item_tokens, attention, item_index)
        t5, heads = network.t5, network.t5.config.num_heads
        self._no_past = (heads, 0, t5.config.d_kv)
        self._encoder = _session(onnx_graph.encoder(t5), threads)
        self._cross = _session(onnx_graph.cross_keys_values(t5), threads)
        self._step = _session(
            onnx_graph.step(t5, int8, cross_heads=heads if network.ages.number or network.times else 1), threads
        )
        self._inputs = [value.name for value in self._step.get_inputs()]

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        per_item = self.item_tokens.shape[1]
        bias = self.network.t5.encoder_bias(mask, self.attention, per_item)
        inputs = {"x": self.network.embed_history(tokens, items, per_item).numpy(), "bias": bias.numpy()}
        return torch.from_numpy(_run(self._encoder, inputs)[0])

    def cross_keys_values(
        self, hidden: torch.Tensor, mask: torch.Tensor, buckets: torch.Tensor | None = None
    ) -> CrossKeysValues:
        """Its arrays are as `step` needs them, (B, S, H * d_kv)."""
        layers: Any = _run(self._cross, {"hidden": hidden.numpy()})
        return CrossKeysValues(layers, self.network.history_bias(mask, self.item_tokens.shape[1], buckets))

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        layers: Any = cross.layers
        no_past: Any = [np.empty((len(x), *self._no_past), np.float32)] * len(layers)
        values = (x.numpy(), bias.numpy(), cross.bias.numpy(), *layers, *(past or no_past))
        *present, hidden = _run(self._step, dict(zip(self._inputs, values, strict=True)))
        return torch.from_numpy(hidden), present

    def first_slots(self, past: KeysValues, count: int) -> KeysValues:
        shortened: list[Any] = [np.ascontiguousarray(array[:, :, :count]) for array in cast(list[Any], past)]
        return shortened


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> Any:
    """All outputs, computed with subnormal floats flushed to zero.

    ONNX Runtime's softmax produces a subnormal for every score that a mask has set to -inf, which most are in a search,
    and each costs the processor a hundred cycles. The switch is per thread.
    """
    torch.set_flush_denormal(True)
    try:
        return session.run(None, inputs)
    finally:
        torch.set_flush_denormal(False)


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other processes need the cores
    if threads > 1:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as in `_run`, for its threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL  # merges repeated int8 nodes
    options.enable_mem_pattern = False  # it keeps a plan per combination of shapes, which are unbounded
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
