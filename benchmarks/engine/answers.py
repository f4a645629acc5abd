"""The answers of all contenders in one form, and whether two of them are the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Paths:
    """A contender's answers, best first. Shapes: tokens (B, K, T) int64; scores (B, K) float32.

    T identifies an answer: its M tokens, after L reasoning tokens where these were searched too, or the item's row.
    """

    tokens: torch.Tensor
    scores: torch.Tensor


def same_answers(found: Paths, expected: Paths, tolerance: float) -> bool:
    """Whether scores and items are the same. Items that tie with the last one, within the tolerance, may differ."""
    if found.tokens.shape != expected.tokens.shape or not _close(found.scores, expected.scores, tolerance):
        return False
    for b in range(len(expected.tokens)):
        one, two = (
            {tuple(path): score for path, score in zip(p.tokens[b].tolist(), p.scores[b].tolist(), strict=True)}
            for p in (found, expected)
        )
        last = float(expected.scores[b].min())
        if any(abs(one[path] - two[path]) > tolerance for path in one.keys() & two.keys()):
            return False
        if any((one | two)[path] > last + tolerance for path in one.keys() ^ two.keys()):
            return False
    return True


def overlap(found: Paths, expected: Paths, count: int = 10) -> float:
    """The share of the best `count` items that both found."""
    shares = [
        len({*map(tuple, one[:count].tolist())} & {*map(tuple, two[:count].tolist())}) / min(count, len(two))
        for one, two in zip(found.tokens, expected.tokens, strict=True)
    ]
    return float(np.mean(shares))


def _close(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(one.float(), two.float(), rtol=0, atol=tolerance))
