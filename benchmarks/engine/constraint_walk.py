"""A beam search without its network, over random log-probabilities, that times a contender's constraint."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from benchmarks.engine.constraint_contenders import LEVELS, VOCABULARY, Contender

BEAMS = 50
BATCHES = (1, 8)
SAMPLES = 5  # sets of log-probabilities that rounds go through
SEED = 0

Row = dict[str, Any]


class Walk:
    """Searches with one contender and keeps the seconds of each search: of the constraint alone, and of all of it."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.expand: list[float] = []
        self.whole: list[float] = []

    def run(self, log_probs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best beams. Shapes: LEVELS of (B, BEAMS, V) -> scores (B, BEAMS), paths (B, BEAMS)."""
        contender, batch = self.contender, log_probs[0].shape[0]
        beam, scores = contender.root(batch), torch.zeros(batch, 1)
        expanding, began = 0.0, time.process_time()
        for level in range(LEVELS):
            before = time.process_time()
            step, context = contender.expand(log_probs[level][:, : scores.shape[1]], beam, level)
            expanding += time.process_time() - before
            candidates = scores.unsqueeze(-1) + step
            scores, flat = candidates.flatten(1).topk(min(BEAMS, candidates[0].numel()))
            beam = contender.follow(beam, context, flat // step.shape[-1], flat % step.shape[-1])
        self.whole.append(time.process_time() - began)
        self.expand.append(expanding)
        return scores, contender.paths(beam)

    def clear_times(self) -> None:
        self.expand, self.whole = [], []

    def per_step(self) -> dict[str, float]:
        """Microseconds of one step, medians over searches."""
        return {
            "expand_us": round(statistics.median(self.expand) * 1e6 / LEVELS, 1),
            "step_us": round(statistics.median(self.whole) * 1e6 / LEVELS, 1),
        }


def samples(batch: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        [torch.randn(batch, BEAMS, VOCABULARY, generator=generator).log_softmax(-1) for _ in range(LEVELS)]
        for _ in range(SAMPLES)
    ]


def take_turns(walks: Collection[Walk], log_probs: list[list[torch.Tensor]], rounds: int) -> None:
    for turn in range(rounds):
        for walk in walks:
            walk.run(log_probs[turn % SAMPLES])


def agree(walks: list[Walk], log_probs: list[list[torch.Tensor]]) -> None:
    """Raises SystemExit where two contenders do not find the same items with the same scores."""
    for sample in log_probs:
        expected = walks[0].run(sample)
        for walk in walks[1:]:
            scores, paths = walk.run(sample)
            if not (torch.equal(scores, expected[0]) and torch.equal(paths, expected[1])):
                raise SystemExit(f"{walk.contender.name} finds other items than {walks[0].contender.name}.")
