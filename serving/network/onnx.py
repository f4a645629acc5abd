"""The network's passes by ONNX Runtime, for serving on a CPU: the same answers as eager torch in about half the time.

The encoder and the decoder step are ONNX graphs; the rest (embeddings, position bias, keys and values of the
cross-attention, the method's heads) is eager torch. There is no CUDA here: on a GPU the search, eager step included, is
captured as one graph, which leaves nothing for another runtime to save.
"""

from __future__ import annotations

import os
from typing import Any

# Before the import: official builds report every session to their maker, and keep an identifier of the machine on its
# disk for that. The two names of the switch are those of older and of newer releases.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}

import onnxruntime
import torch

from serving.network import onnx_graph
from serving.network.eager import EagerRuntime
from serving.network.model import StreamRec
from serving.network.t5 import CrossKeysValues, KeysValues, float_mask
from serving.types import EncoderAttention


class OnnxRuntime(EagerRuntime):
    """Runs a StreamRec's weights as they are now. Implements `Runtime`.

    threads: of ONNX Runtime's arithmetic. int8: the decoder step's weights in 8 bits. The encoder stays float32: an
    encoder state is then the same whichever runtime made it, and one cache may hold it for all.

    Nothing is copied: torch, numpy and ONNX Runtime share the same buffers. What the search only passes on, the past
    and `CrossKeysValues.layers`, stays a flat list of arrays (keys, values, layer by layer): making tensors of them
    cost 5% of a search.
    """

    def __init__(
        self,
        network: StreamRec,
        item_tokens: torch.Tensor,
        attention: EncoderAttention,
        *,
        threads: int = 1,
        int8: bool = False,
    ) -> None:
        super().__init__(network, item_tokens, attention)
        t5, self._heads = network.t5, network.t5.config.num_heads
        self._encoder = _session(onnx_graph.encoder(t5), threads)
        self._step = _session(onnx_graph.step(t5, int8), threads)
        self._inputs = [value.name for value in self._step.get_inputs()]
        attentions = [block.cross_attention.part for block in t5.decoder.blocks]
        self._cross = [
            project.weight.detach().T.contiguous() for attention in attentions for project in (attention.k, attention.v)
        ]

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = self.network.t5.encoder_bias(mask, self.attention, self.item_tokens.shape[1])
        inputs = {"x": self.network.t5.shared(tokens).numpy(), "bias": bias.numpy()}
        return torch.from_numpy(_run(self._encoder, inputs)[0])

    def cross_keys_values(self, hidden: torch.Tensor, mask: torch.Tensor) -> CrossKeysValues:
        """Its arrays are views of what `step` wants, (B, S, H * d_kv)."""
        layers: Any = [(hidden @ w).unflatten(-1, (self._heads, -1)).transpose(1, 2).numpy() for w in self._cross]
        return CrossKeysValues(layers, float_mask(mask))

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor, KeysValues]:
        layers: Any = cross.layers
        past = past or [keys_or_values[:, :, :0] for keys_or_values in layers]
        joined = [view.swapaxes(1, 2).reshape(len(view), view.shape[2], -1) for view in layers]  # views again
        values = (x.numpy(), bias.numpy(), cross.mask.numpy(), *joined, *past)
        *present, hidden, logits = _run(self._step, dict(zip(self._inputs, values, strict=True)))
        return torch.from_numpy(hidden), torch.from_numpy(logits), present


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> Any:
    """All outputs. Numbers too small for float32's normal form are zero meanwhile.

    The softmax of ONNX Runtime comes by such a number for every score that a mask has put to -inf, as most are in a
    search, and each costs the processor a hundred cycles. The switch is the calling thread's.
    """
    torch.set_flush_denormal(True)
    try:
        return session.run(None, inputs)
    finally:
        torch.set_flush_denormal(False)


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores belong to others too
    if threads > 1:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # its own threads, as `_run` the caller's
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL  # merges what int8 repeats
    options.enable_mem_pattern = False  # a plan is kept for every combination of shapes, and there is no end of those
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
