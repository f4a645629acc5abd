"""The network's passes by ONNX Runtime, for serving on a CPU: the same answers as eager torch in about half the time.

The encoder, the memory and the decoder step are ONNX graphs; the small rest (embeddings, position bias, the method's
heads) is eager torch. There is no CUDA here: on a GPU the search, eager step included, is recorded as one graph, which
leaves nothing for another runtime to save.
"""

from __future__ import annotations

import onnxruntime
import torch

from serving.model import EncoderAttention, KeysValues, Memory, StreamRec, float_mask
from serving.runtimes import onnx_graph
from serving.runtimes.eager import EagerRuntime


class OnnxRuntime(EagerRuntime):
    """Runs a StreamRec's weights as they are now. Implements `Runtime`.

    threads: of ONNX Runtime's arithmetic. int8: the decoder step's weights in 8 bits. The encoder stays float32: an
    encoder state is then the same whichever runtime made it, and one cache may hold it for all.
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
        self._encoder = _session(onnx_graph.encoder(network.t5), threads)
        self._memory = _session(onnx_graph.memory(network.t5), threads)
        self._step = _session(onnx_graph.step(network.t5, int8), threads)

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = self.network.t5.encoder_bias(mask, self.attention, self.item_tokens.shape[1])
        return _run(self._encoder, {"x": self.network.t5.shared(tokens), "bias": bias})[0]

    def memory(self, hidden: torch.Tensor, mask: torch.Tensor) -> Memory:
        cross = _run(self._memory, {"hidden": hidden})
        return Memory(_pairs(cross), float_mask(mask))

    def step(
        self, x: torch.Tensor, bias: torch.Tensor, memory: Memory, past: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor, KeysValues]:
        inputs = {"x": x, "bias": bias, "mask": memory.mask}
        for i, (keys, values) in enumerate(memory.cross):
            nothing = keys[:, :, :0]
            past_keys, past_values = past[i] if past else (nothing, nothing)
            inputs |= {f"cross_keys_{i}": keys, f"cross_values_{i}": values}
            inputs |= {f"past_keys_{i}": past_keys, f"past_values_{i}": past_values}
        *present, hidden, logits = _run(self._step, inputs)
        return hidden, logits, _pairs(present)


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores belong to others too
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL  # merges what int8 repeats
    options.enable_mem_pattern = False  # a plan is kept for every combination of shapes, and there is no end of those
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All outputs, in the graph's order. Nothing is copied: torch, numpy and ONNX Runtime see the same memory."""
    return [torch.from_numpy(output) for output in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def _pairs(tensors: list[torch.Tensor]) -> KeysValues:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
