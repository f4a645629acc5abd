"""Where the time of one search goes: the network's passes, the constraint, the top-k, and the rest."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from serving.items.trie import Trie
from serving.network.runtime import Runtime
from serving.network.t5 import CrossKeysValues
from serving.search.beam import search
from serving.types import SearchSettings

# method of a runtime -> part
NETWORK = dict.fromkeys(("step", "logits", "embed", "step_input", "state"), "step")
CONSTRAINT = {"expand": "constraint"}
PARTS = ("encode", "cross_keys_values", "step", "constraint", "topk", "rest")

Spent = defaultdict[str, float]  # seconds by part


def clock() -> float:
    """CPU seconds of the process, all threads together, which other work on the machine hardly affects."""
    return time.process_time()


class Timed:
    """A proxy of another object that adds the time of some of its methods to `spent`, by part."""

    def __init__(self, target: Any, parts: Mapping[str, str], spent: Spent) -> None:
        self._target = target
        for method, part in parts.items():
            setattr(self, method, timed(getattr(target, method), part, spent))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def timed(function: Callable[..., Any], part: str, spent: Spent) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        begin = clock()
        result = function(*arguments, **options)
        spent[part] += clock() - begin
        return result

    return run


def breakdown(
    runtime: Runtime,
    trie: Trie,
    settings: SearchSettings,
    tokens: torch.Tensor,
    *,
    steps: int,
    beams: int,
    rounds: int,
) -> dict[str, float]:
    """Milliseconds by part, medians over `rounds` searches. `encode` precedes the search and is not part of it.

    Shape: tokens (B, S) int64.
    """
    mask = torch.ones_like(tokens, dtype=torch.bool)
    seen: list[Spent] = []
    for _ in range(rounds + 1):
        spent: Spent = defaultdict(float)
        hidden = timed(runtime.encode, "encode", spent)(tokens, mask)
        begin = clock()
        cross: CrossKeysValues = timed(runtime.cross_keys_values, "cross_keys_values", spent)(hidden, mask)
        network: Any = Timed(runtime, NETWORK, spent)
        constraint: Any = Timed(trie, CONSTRAINT, spent)
        with patch.object(torch.Tensor, "topk", timed(torch.Tensor.topk, "topk", spent)):
            search(network, constraint, settings, cross, steps=steps, beam_width=beams)
        whole = clock() - begin
        spent["rest"] = whole - sum(spent[part] for part in PARTS if part != "encode")
        seen.append(spent)
    return {part: statistics.median(spent[part] for spent in seen[1:]) * 1000 for part in PARTS}  # the first warms up
