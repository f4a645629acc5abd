"""How the item memory joins the network's scores.

    score(item) = log( g * exp(network(item)) + (1 - g) * share(item) )        [open]
    log(g / (1 - g)) = intercept + sum of coefficient * feature - log(weight)

The gate g follows from what the memory and the network know of a history (`serving.types.Gate`) and from nothing that a
request's rules, beams or batch could change; weight is the request's `neighbours_weight`. network(item) is log P of the
item's tokens, the weighted dense score included. Neither part is normalised over what is permitted, so a rule removes
items and changes no score. Where the memory knows nothing of a history, or its weight is 0, g is 1 and the score is the
network's.

Older bundles have no gate: weight * log(share(item) + floor) is added to the network's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from serving.items.neighbours import Neighbours
from serving.types import BundleSettings

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What the memory says of a batch. values: (B, I) float32, shares, or log scores if there is no gate.

    gate: (B,) float64, log odds of the network at weight 1, without what its own confidence adds; inf where the memory
    knows nothing. None: no gate.
    """

    values: np.ndarray
    gate: np.ndarray | None

    def explained(self, request: int, items: Sequence[int]) -> list[float | None]:
        """Log shares, or log scores, of some items of a request; None for an item without a share."""
        values = self.values[request, items]
        if self.gate is None:
            return [float(value) for value in values]
        return [float(np.log(value)) if value > 0 else None for value in values]


@dataclass(frozen=True, slots=True)
class MemoryScores:
    """The same on the device, weighted. scores: (B, I) float32, shares, or what is added to the network's scores.

    gate: (B,) float32, as in `LookedUp` with the weight included; inf for a request without memory. None: no gate.
    """

    scores: torch.Tensor
    gate: torch.Tensor | None


def look_up(
    neighbours: Neighbours, settings: BundleSettings, histories: Sequence[Sequence[int] | np.ndarray]
) -> LookedUp:
    """Histories are catalogue rows, oldest first."""
    if settings.gate is None:
        return LookedUp(neighbours.log_scores(histories, settings.max_items), None)
    shares, features = neighbours.shares(histories, settings.max_items)
    coefficients = asdict(settings.gate)
    known = features["support"] > NEG_INF
    gate = np.full(len(known), coefficients["intercept"])
    for name, values in features.items():
        gate += coefficients[name] * np.where(known, values, 0)
    return LookedUp(shares, np.where(known, gate, np.inf))


def weighted(found: LookedUp, weights: Sequence[float], device: torch.device) -> MemoryScores | None:
    """weights: a request's each; None if all are 0."""
    weight = np.array(weights, np.float32)
    if not weight.any():
        return None
    if found.gate is None:
        return MemoryScores(torch.from_numpy(weight[:, None] * found.values).to(device), None)
    with np.errstate(divide="ignore"):
        gate = (found.gate - np.log(weight)).astype(np.float32)
    return MemoryScores(torch.from_numpy(found.values).to(device), torch.from_numpy(gate).to(device))


def mixed(network: torch.Tensor, share: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """log( g * exp(network) + (1 - g) * share ), and -inf for what the search has not found.

    Shapes: network (B, N), -inf where there is no item, share (B, N), gate (B,) -> (B, N).
    """
    gate = gate[:, None]
    scores = torch.logaddexp(F.logsigmoid(gate) + network, F.logsigmoid(-gate) + share.log())
    return scores.masked_fill(network == NEG_INF, NEG_INF)
