"""The losses of the three stages. Each opens with its formula and marks what the paper gives or leaves open."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from serving.network.model import dense_logits
from training.stages.predictions import Predictions

EPSILON = 1e-4  # of a group's standard deviation, which may be zero
LOGITS_AT_ONCE = 1 << 27  # of the softmax over all items: 512 MiB, and as much again for their gradient


def nll(predictions: Predictions, tokens: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """L = - sum_t log P(y_t | y_<t, x)   [paper, stages 1 and 2], averaged over sequences.

    smoothing: the share of a label that is spread evenly over all that P is normalised over   [open: against
    overfitting].
    Shape: tokens (B, Q, T) int64 -> scalar.
    """
    loss = -predictions.of(tokens)
    if smoothing:
        even = torch.stack([-log_probs.mean(-1) for log_probs in predictions.log_probs], -1)
        loss = (1 - smoothing) * loss + smoothing * even
    return loss.sum(-1).mean()


def contrastive(
    state: torch.Tensor, target: torch.Tensor, item: torch.Tensor, local_index: torch.Tensor, temperature: float
) -> torch.Tensor:
    """L = - log exp(cos(s, t)/tau) / sum_b exp(cos(s, t_b)/tau) over the batch   [paper: in-batch; open: cosine, tau].

    Shapes: target (B, D) and item (B,) int64 of the batch, state (b, D) of its rows `local_index` (b,) -> scalar.
    Rows of the same item are no negatives of each other.
    """
    cosine = F.normalize(state, dim=-1) @ F.normalize(target, dim=-1).T / temperature  # (b, B)
    twin = item[local_index, None] == item[None, :]
    twin[torch.arange(len(local_index), device=item.device), local_index] = False
    return F.cross_entropy(cosine.masked_fill(twin, float("-inf")), local_index)


def full_softmax(
    state: torch.Tensor, vectors: torch.Tensor, item: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """L = - log softmax_i(<s, v_i> / sqrt(D))[target], over all items   [open: what gained where in-batch did not].

    smoothing: the share of a label that is spread evenly over the items. Of more than LOGITS_AT_ONCE logits, a part at
    a time stands in memory; those are computed again for the gradient.

    Shapes: state (B, D), vectors (I, D), item (B,) int64 -> scalar.
    """
    rows = max(1, LOGITS_AT_ONCE // len(vectors))
    if len(state) <= rows:
        return F.cross_entropy(dense_logits(state, vectors), item, label_smoothing=smoothing)

    def summed(states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(dense_logits(states, vectors), items, label_smoothing=smoothing, reduction="sum")

    parts = [
        checkpoint(summed, state[first : first + rows], item[first : first + rows], use_reentrant=False)
        for first in range(0, len(state), rows)
    ]
    return torch.stack(parts).sum() / len(state)


def quantization(residual: torch.Tensor, code: torch.Tensor, commitment: float = 0.25) -> torch.Tensor:
    """L = ||sg[r] - c||^2 + 0.25 ||r - sg[c]||^2   [paper: pulls residual and token together; open: form and weight].

    Shapes: residual, code (B, D) -> scalar, mean over the batch, summed over D.
    """
    pull_code = (residual.detach() - code).square().sum(-1)
    pull_residual = (residual - code.detach()).square().sum(-1)
    return (pull_code + commitment * pull_residual).mean()


def preference(
    winner: torch.Tensor,
    loser: torch.Tensor,
    reference_winner: torch.Tensor,
    reference_loser: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DPO: L = - log sigmoid(beta [(log p(y_w) - log ref(y_w)) - (log p(y_l) - log ref(y_l))]).

    [paper]: the reasoned answer y_w = [o_1 .. o_l ; target] is preferred to the direct one.
    [open]: y_l is the best item of the direct answer that is not the target (were it the target, the loss would lower
    its likelihood without reasoning); the reference is this network after `preference_after` steps of stage 2, as stage
    1 never saw a reasoning code.
    Shapes: log-probabilities (B,) -> scalar.
    """
    margin = (winner - reference_winner) - (loser - reference_loser)
    return -F.logsigmoid(beta * margin).mean()


def distillation(student: Predictions, teacher: Predictions) -> torch.Tensor:
    """L = sum_t KL(P_teacher(. | y_<t) || P_student(. | y_<t)), the teacher held fixed   [open: fewer steps from many].

    A scalar, averaged over sequences.
    """
    pairs = zip(student.log_probs, (given.detach() for given in teacher.log_probs), strict=True)
    each = [(given.exp() * (given - learnt)).sum(-1) for learnt, given in pairs]  # T of (B, Q)
    return torch.stack(each).sum(0).mean()


def grpo(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    advantage: torch.Tensor,
    clip: float,
    beta: float,
) -> torch.Tensor:
    """L = - E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)] + beta KL, rho = exp(log p - log p_old)   [paper, stage 3].

    KL per token by the k3 estimator, exp(ref - p) - (ref - p) - 1   [open]. Mean over tokens.
    Shapes: log-probabilities (B, G, T), advantage (B, G) -> scalar.
    """
    ratio = (log_probs - old).exp()
    weight = advantage.unsqueeze(-1)
    gain = torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)
    gap = reference - log_probs
    kl = gap.exp() - gap - 1
    return (beta * kl - gain).mean()


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A = (R - mean of the group) / (std of the group + eps)   [paper: group-relative]. Shape: (B, G) -> (B, G).

    A group whose rewards are all equal teaches nothing: its advantages are 0.
    """
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True, correction=0) + EPSILON)
