"""Steps between an item's tokens: before each of its first levels the decoder takes a step, and then writes the code.

    start_0, [o_1], c_1, [o_2], c_2, c_3      a step stands where the arm has one; `before` are its levels, from 0
    input of a step = E(o_j) + W_f MLP_s(sum of the decoder's outputs so far)            as of a step before the item

o_j is the cluster of the code that follows: the level's codes are clustered by k-means of their vectors, which are
what the step's tokens begin as, and the decoder's own likeliest token is the input, in training as in the search. A
pause is the same token for every beam, and none is taught. [open: not in the paper; as in IBA, before early levels.]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.beam import search_settings
from serving.search.decoder import decode_step, select_rows, stable_topk, token_log_probs
from training.config import SftConfig
from training.data.examples import Rows, batch_at
from training.stages.begin import centres
from training.stages.distributed import WHOLE_BATCH, BatchShard, Terms
from training.stages.losses import full_softmax, nll
from training.stages.predictions import predict, predict_items
from training.stages.reasoning import own_prefix, teacher_force_directly
from training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Steps:
    """before: levels that have a step before them. first: the id of each one's first token; count: its tokens, 1 for a
    pause. clusters: (C,) int64 for each, the token of a code, counted from 0; of a pause, zeros."""

    before: tuple[int, ...]
    first: tuple[int, ...]
    count: int
    clusters: tuple[torch.Tensor, ...]

    def ids(self, level: int) -> tuple[int, int]:
        """[first, last + 1) of the tokens of the step before a level."""
        first = self.first[self.before.index(level)]
        return first, first + self.count


@torch.no_grad()
def begin_steps(work: Workspace, before: tuple[int, ...], pause: bool) -> Steps:
    """Sets the steps' tokens to the clusters' centres. The levels of `before` share the reasoning codes evenly."""
    lo, hi = work.vocabulary.reasoning_range
    count, table = 1 if pause else (hi - lo) // len(before), work.network.t5.shared.weight
    first, clusters = [], []
    for number, level in enumerate(before):
        low, high = work.vocabulary.level_ranges[level]
        codes = table[low:high].cpu()
        middle = centres(codes, count, work.config.seed)
        first.append(lo + number * count)
        table[first[-1] : first[-1] + count] = middle.to(table.device)
        clusters.append(work.send(torch.cdist(codes, middle).argmin(1)))
    return Steps(before, tuple(first), count, tuple(clusters))


class InterleavedStep:
    """The loss of a training step: answers without steps and with them on one encoder pass, the steps' tokens, and the
    state that the dense score compares."""

    kept = None

    def __init__(self, work: Workspace, config: SftConfig, steps: Steps) -> None:
        self.work, self.config, self.steps = work, config, steps
        self.rows: Rows = work.windows or work.examples

    def __call__(self, step: int, shard: BatchShard = WHOLE_BATCH) -> tuple[torch.Tensor, Terms]:
        work, config = self.work, self.config
        examples = self.rows.examples(batch_at(self.rows, config.batch_size, work.config.seed + 1, step))
        shard = shard.of(len(examples))
        index = shard.local(shard.micro_batch(range(len(examples))))
        target_item = work.send(examples.targets(index))
        target = work.item_tokens[target_item].unsqueeze(1)  # (B, 1, M)
        cross = work.encode_examples(examples, index)
        hidden, state = teacher_force_directly(work.network, cross, work.vocabulary.start_tokens[0], target)
        reasoned, chosen = decode_with_steps(work, cross, target, self.steps)
        vectors = work.network.item_vectors(work.item_tokens)
        terms = {
            "nll_plain": config.plain_weight * nll(predict_items(work, hidden), target, config.label_smoothing),
            "nll_answer": config.answer_weight * nll(predict_items(work, reasoned), target, config.label_smoothing),
            "state": config.state_weight * full_softmax(state[:, 0], vectors, target_item),
        }
        if self.steps.count > 1:
            terms["nll_steps"] = config.reasoning_weight * nll(
                predict(work, chosen, [self.steps.ids(level) for level in self.steps.before]),
                labels(work, target, self.steps),
            )
        total = torch.stack(list(terms.values())).sum()
        return shard.mean(total, {name: value.detach() for name, value in terms.items()})


def labels(work: Workspace, item: torch.Tensor, steps: Steps) -> torch.Tensor:
    """What the steps before an item's codes should write. Shape: item (B, 1, M) int64 -> (B, 1, steps)."""
    of = [
        first + cluster[item[..., level] - work.vocabulary.level_ranges[level][0]]
        for level, first, cluster in zip(steps.before, steps.first, steps.clusters, strict=True)
    ]
    return torch.stack(of, -1)


def decode_with_steps(
    work: Workspace, cross: CrossKeysValues, item: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Shapes: item (B, 1, M) -> the outputs that predict its codes, (B, 1, M, D), and those that choose the tokens of
    the steps, each (B, 1, D)."""
    network, t5 = work.network, work.network.t5
    done, past, total = 0, None, torch.zeros(())

    def decode(x: torch.Tensor) -> torch.Tensor:
        nonlocal done, past, total
        hidden, past = t5.decode(x, own_prefix(t5, 1, done, 1), cross, past)
        done, total = done + 1, total + hidden
        return hidden

    outputs, chosen = [], []
    x = t5.shared(torch.full_like(item[..., 0], work.vocabulary.start_tokens[0]))
    for level in range(item.shape[-1]):
        hidden = decode(x)
        if level in steps.before:
            chosen.append(hidden)
            first, end = steps.ids(level)
            token = t5.logits(hidden, (first, end)).argmax(-1) + first
            hidden = decode(network.step_input(token, network.heads.state(total)))
        outputs.append(hidden)
        x = t5.shared(item[..., level])
    return torch.stack(outputs, 2), chosen


@torch.inference_mode()
def search(
    runtime: Runtime, work: Workspace, cross: CrossKeysValues, steps: Steps, beams: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best items of B histories, every beam with steps of its own, their scores, and the tokens of the best one's
    steps. Without steps it is the search that is served.

    Shapes: items (B, K) int64, scores (B, K), tokens (B, steps) int64.
    """
    trie, settings = work.trie, search_settings(work.vocabulary, work.settings)
    start = torch.full((cross.bias.shape[0], 1), settings.start_tokens[0], dtype=torch.int64, device=runtime.device)
    scores, node = torch.zeros(start.shape, device=runtime.device), torch.zeros_like(start)
    tokens = start.new_zeros(*start.shape, 0)
    hidden, cache = decode_step(runtime, cross, None, runtime.embed(start))
    total = hidden
    for level, block in enumerate(settings.level_ranges):
        if level in steps.before:
            first, _ = ids = steps.ids(level)
            token = runtime.logits(hidden, ids).argmax(-1) + first
            tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
            hidden, cache = decode_step(runtime, cross, cache, runtime.step_input(token, runtime.state(total)))
            total = total + hidden
        log_probs = token_log_probs(runtime, settings, hidden, block)
        step, child = trie.expand(log_probs, node, level, first_id=block[0])
        candidates = (scores.unsqueeze(-1) + step).flatten(1)
        count = min(beams, trie.nodes_at(level + 1), candidates.shape[1])
        flat = stable_topk(candidates, child.flatten(1), count)
        scores, parent = candidates.gather(1, flat), flat // child.shape[2]
        node = child.flatten(1).gather(1, flat).long()
        tokens = select_rows(tokens, parent)
        if level + 1 < trie.levels:
            x = runtime.embed(trie.token[node].long())
            hidden, cache = decode_step(runtime, cross, cache.select(parent), x)
            total = select_rows(total, parent) + hidden
    return trie.item[node - trie.level_start[trie.levels]].long(), scores, tokens[:, 0]
