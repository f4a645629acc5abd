"""Iterative inference: how the decoder reasons, with gradients, and the labels o_1..o_l that supervise it.

Stage 2 of the paper, for i = 1..l with d_j the decoder's output at position j and t the target's representation:

    r_i = MLP_r(t - s_{i-1})               what is still missing            [paper]
    o_i = argmin_{c_k} || c_k - r_i ||     the reasoning token              [paper]
    s_i = MLP_s(sum_{j=0..i} d_j)          the state after it               [paper]

Departures, each a setting: a step's input may be the model's own token instead of the label, and carry the state [open:
the literal recipe leaks the target into what it trains on]; labels may be balanced over the codes by Sinkhorn [open:
the argmin collapses onto one code]. The search that serves does the same without gradients (serving/search/beam.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.network.model import StreamRec
from serving.network.t5 import T5, CrossKeysValues, KeysValues
from training.stages.distributed import WHOLE_BATCH, BatchShard

# (step from 1, the decoder's output d_{i-1} (B, Q, D), state s_{i-1} (B, Q, D)) -> token (B, Q)
Choose = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class ReasoningTrace:
    """Q reasoning paths of B histories, ready for their last position, which runs together with the item's tokens.

    next_input (B, Q, D): the decoder's input at position l. hidden_sum (B, Q, D): d_0 + .. + d_{l-1}.
    states: s_0..s_{l-1}, each (B, Q, D). tokens: o_1..o_l, each (B, Q); hidden: d_0..d_{l-1}, which predict them,
    each (B, Q, D).
    """

    next_input: torch.Tensor
    hidden_sum: torch.Tensor | None
    past: KeysValues | None
    states: list[torch.Tensor]
    tokens: list[torch.Tensor]
    hidden: list[torch.Tensor]

    @property
    def steps(self) -> int:
        return len(self.states)


def begin(network: StreamRec, start_token: int, batch: int, paths: int = 1) -> ReasoningTrace:
    """No step yet: the start token, which announces the number of steps."""
    start = torch.full((batch, paths), start_token, dtype=torch.int64, device=network.t5.shared.weight.device)
    return ReasoningTrace(network.t5.shared(start), None, None, [], [], [])


def greedy(network: StreamRec, reasoning_range: tuple[int, int]) -> Choose:
    """Chooses the likeliest reasoning token."""

    @torch.no_grad()
    def choose(step: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return network.t5.logits(hidden, reasoning_range).argmax(-1) + reasoning_range[0]

    return choose


def reason(
    network: StreamRec, cross: CrossKeysValues, start_token: int, steps: int, choose: Choose, paths: int = 1
) -> ReasoningTrace:
    """Runs positions 0..l-1 and chooses o_1..o_l. Where the state alone is fed back, the input ignores the token."""
    t5, heads = network.t5, network.heads
    trace = begin(network, start_token, cross.bias.shape[0], paths)
    for i in range(1, steps + 1):
        bias = own_prefix(t5, paths, i - 1, 1)
        hidden, trace.past = t5.decode(trace.next_input, bias, cross, trace.past)
        trace.hidden_sum = hidden if trace.hidden_sum is None else trace.hidden_sum + hidden
        state = heads.state(trace.hidden_sum)
        token = choose(i, hidden, state)
        trace.states.append(state)
        trace.tokens.append(token)
        trace.hidden.append(hidden)
        trace.next_input = network.step_input(token, state)
    return trace


def teacher_force(
    network: StreamRec, cross: CrossKeysValues, trace: ReasoningTrace, item: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What predicts the item's tokens after the reasoning, in one pass together with its last position.

    Shapes: item (B, Q, M) int64 -> the decoder's outputs (B, Q, M, D), which predict c_1..c_M, and the final state s_l
    (B, Q, D).
    """
    t5 = network.t5
    batch, paths, levels = item.shape
    inputs = torch.cat([trace.next_input.unsqueeze(2), t5.shared(item[..., :-1])], 2)  # (B, Q, M, D)
    bias = own_prefix(t5, paths, trace.steps, levels)
    hidden, _ = t5.decode(inputs.flatten(1, 2), bias, cross, trace.past)
    hidden = hidden.view(batch, paths, levels, -1)
    last = hidden[:, :, 0]
    hidden_sum = last if trace.hidden_sum is None else trace.hidden_sum + last
    return hidden, network.heads.state(hidden_sum)


def teacher_force_directly(
    network: StreamRec, cross: CrossKeysValues, start_token: int, item: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`teacher_force` without reasoning. Shapes: item (B, Q, M) -> (B, Q, M, D), (B, Q, D)."""
    return teacher_force(network, cross, begin(network, start_token, *item.shape[:2]), item)


def own_prefix(t5: T5, paths: int, done: int, new: int) -> torch.Tensor:
    """Bias for Q paths that each see their own earlier positions only.

    `done` positions lie in the past (position by position, all paths of one together), `new` come now (path by path).
    Shape: (1, H, Q * new, Q * done + Q * new).
    """
    device = t5.shared.weight.device
    path = torch.arange(paths, device=device)
    past_path, past_at = path.repeat(done), torch.arange(done, device=device).repeat_interleave(paths)
    new_path, new_at = path.repeat_interleave(new), torch.arange(done, done + new, device=device).repeat(paths)
    key_path, key_at = torch.cat([past_path, new_path]), torch.cat([past_at, new_at])
    unseen = (key_path[None, :] != new_path[:, None]) | (key_at[None, :] > new_at[:, None])
    return t5.decoder.position_bias(new_at, key_at).masked_fill(unseen, float("-inf")).unsqueeze(0)


def residual_label(
    network: StreamRec,
    target: torch.Tensor,
    state: torch.Tensor,
    reasoning_range: tuple[int, int],
    balanced: bool,
    shard: BatchShard = WHOLE_BATCH,
) -> tuple[torch.Tensor, torch.Tensor]:
    """r_i = MLP_r(t - s_{i-1}) and o_i, the code nearest to it [paper, stage 2].

    Shapes: target t (B, D), state s_{i-1} (B, D) -> o_i (B,) int64 vocabulary ids, r_i (B, D) with gradient.
    balanced: spread the micro-batch, on all processes, over the codes by Sinkhorn [open].
    """
    lo, hi = reasoning_range
    residual = network.heads.residual(target - state)
    codes = network.t5.shared.weight[lo:hi]
    distance = torch.cdist(residual.detach(), codes.detach())
    choice = shard.local(sinkhorn(-shard.gather(distance)).argmax(-1)) if balanced else distance.argmin(-1)
    return choice + lo, residual


def sinkhorn(scores: torch.Tensor, sharpness: float = 20.0, rounds: int = 5) -> torch.Tensor:
    """Assignment of a batch to codes with near equal use of every code (Sinkhorn-Knopp).

    Shape: (B, R) -> (B, R), rows sum to 1.
    The scores are scaled to unit spread first, so that `sharpness` has no unit.
    """
    plan = (scores - scores.mean()) / (scores.std() + 1e-9) * (sharpness / 4)
    plan = (plan - plan.amax(1, keepdim=True)).exp()
    for _ in range(rounds):
        plan = plan / (plan.sum(0, keepdim=True) + 1e-9)
        plan = plan / (plan.sum(1, keepdim=True) + 1e-9)
    return plan
