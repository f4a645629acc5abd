"""The score of an item as the bundle defines it, by brute force in float64.

Slow and readable: what `search` is held against.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from serving.bundle import Bundle
from serving.histories import history_tokens
from serving.model import dense_logits


@torch.no_grad()
def score_all_items(
    bundle: Bundle, history: tuple[int, ...], reasoning: tuple[int, ...] | int = (), dense_weight: float = 0.0
) -> tuple[np.ndarray, float]:
    """Scores every item after one given reasoning path. Shapes: (I,) float64, scalar.

    reasoning: the path's tokens; for a model whose steps feed back the state alone, the number of steps.
    score = sum over the item's tokens of log_softmax(logits / temperature) + dense_weight * dense log-softmax.
    Returned besides: the log-probability of the reasoning tokens themselves.
    """
    network = copy.deepcopy(bundle.network).double().eval()
    t5, heads, settings = network.t5, network.heads, bundle.settings
    items = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    tokens, mask = history_tokens([history], bundle.catalogue.tokens, settings.max_items, settings.suffix_tokens)
    memory = t5.memory(t5.encode(tokens, mask, settings.attention, items.shape[1]), mask)

    def decode(inputs: torch.Tensor) -> torch.Tensor:
        """All positions at once, nothing cached. Shape: (1, T, D) -> (1, T, D)."""
        at = torch.arange(inputs.shape[1])
        bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], float("-inf"))
        return t5.decode(inputs, bias.unsqueeze(0), memory, None)[0]

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        return (t5.logits(hidden) / settings.temperature).log_softmax(-1)

    steps = reasoning if isinstance(reasoning, int) else len(reasoning)
    inputs = t5.shared(torch.tensor([[bundle.vocabulary.start_tokens[steps]]]))
    reasoning_log_prob = 0.0
    state = heads.state(decode(inputs).sum(1, keepdim=True))
    for i in range(steps):
        token = torch.tensor([[0 if isinstance(reasoning, int) else reasoning[i]]])
        if settings.step_form != "state":
            reasoning_log_prob += float(log_probs(decode(inputs))[0, -1, token])
        inputs = torch.cat([inputs, network.step_input(token, state)], 1)
        state = heads.state(decode(inputs).sum(1, keepdim=True))
    scores = np.empty(len(items))
    for row, item in enumerate(items):
        hidden = decode(torch.cat([inputs, t5.shared(item[:-1]).unsqueeze(0)], 1))
        scores[row] = float(log_probs(hidden)[0, steps:].gather(-1, item.unsqueeze(-1)).sum())
    dense = dense_logits(state[0, 0], network.item_vectors(items)).log_softmax(-1)
    return scores + dense_weight * dense.numpy(), reasoning_log_prob
