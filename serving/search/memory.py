"""How the item memory joins the network's scores.

    score(item) = 1/alpha * log( g * P(item)^alpha + (1 - g) * share(item)^beta )        [open]
    log(g / (1 - g)) = intercept + sum of coefficient * feature - log(weight)

The gate g follows from what the memory and the network know of a history (`serving.types.Gate`) and from nothing that a
request's rules, beams or batch could change; weight is the request's `neighbours_weight`. log P(item) is the network's
score of the item's tokens, the weighted dense score included. The powers alpha and beta are of the gate too: a memory
spreads its shares over all that a history touches, and a beta above 1 gives its first items what they deserve. Neither
part is normalised over what is permitted, so a rule removes items and changes no score. Where the memory knows nothing
of a history, or its weight is 0, g is 1 and the score is the network's.

Older bundles have no gate: weight * log(share(item) + floor) is added to the network's score.

Everything here has the size of what a history touches, never that of the catalogue: an item that is not listed has
share 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from serving.items.neighbours import NO_ITEM, Neighbours, Shares
from serving.types import NEG_INF, BundleSettings, EventData


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What the memory says of a batch. floor: None if there is a gate.

    gate: (B,) float64, log odds of the network at weight 1, without what its own confidence adds; inf where the memory
    knows nothing. None: no gate.
    """

    shares: Shares
    floor: float | None
    gate: np.ndarray | None

    def explained(self, request: int, items: Sequence[int]) -> list[float | None]:
        """Log shares, or log scores, of some items of a request; None for an item without a share."""
        alone = Shares(self.shares.items[[request]], self.shares.values[[request]])
        shares = alone.of(np.array([items], np.int64))[0]
        if self.floor is not None:
            return [float(np.log(share + self.floor)) for share in shares]
        return [float(np.log(share)) if share > 0 else None for share in shares]


@dataclass(frozen=True, slots=True)
class MemoryScores:
    """The same on the device, weighted. A request without weight touches nothing.

    items: (B, T) int64, ascending, then NO_ITEM. scores: (B, T) float32, shares, or what is added to the network's
    scores. elsewhere: (B,) float32, the same for every item that is not listed. gate: (B,) float32, as in `LookedUp`
    with the weight included; inf for a request without memory. None: no gate. decides: whether the gate is known to be
    finite for all requests, whose candidates are then the memory's alone.
    """

    items: torch.Tensor
    scores: torch.Tensor
    elsewhere: torch.Tensor
    gate: torch.Tensor | None
    decides: bool = False

    def of(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of items, and which of them are touched. Shape: (B, N) catalogue rows -> (B, N), (B, N) bool."""
        index, is_touched = find_rows(self.items, items)
        return torch.where(is_touched, self.scores.gather(1, index), self.elsewhere[:, None]), is_touched


def find_rows(ascending: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where items are among each request's ascending rows, and whether they are there at all.

    Shapes: ascending (B, T) int64, items (B, N) int64 -> index (B, N), 0 .. T - 1, and (B, N) bool.
    """
    index = torch.searchsorted(ascending, items.contiguous()).clamp(max=ascending.shape[1] - 1)
    return index, ascending.gather(1, index) == items


def look_up(
    neighbours: Neighbours,
    settings: BundleSettings,
    histories: Sequence[Sequence[int] | np.ndarray],
    events: Sequence[EventData | None] | None = None,
) -> LookedUp:
    """Histories are catalogue rows, oldest first. events: of each history; None: nothing is known of any."""
    shares, features = neighbours.shares(histories, settings.max_items, events)
    if settings.gate is None:
        assert neighbours.floor is not None, "these neighbours were made to be mixed by their shares"
        return LookedUp(shares, neighbours.floor, None)
    coefficients, known = settings.gate.coefficients, features["support"] > NEG_INF
    gate = np.full(len(known), settings.gate.intercept)
    for name, values in features.items():
        gate += coefficients[name] * np.where(known, values, 0)
    return LookedUp(shares, None, np.where(known, gate, np.inf))


def weighted(found: LookedUp, weights: Sequence[float], device: torch.device) -> MemoryScores | None:
    """weights: a request's each; None if all are 0."""
    weight = np.array(weights, np.float32)
    if not weight.any():
        return None
    items = np.where(weight[:, None] > 0, found.shares.items, NO_ITEM)
    scores, elsewhere, gate, decides = found.shares.values, np.zeros_like(weight), None, False
    if found.floor is not None:
        scores, elsewhere = weight[:, None] * np.log(scores + found.floor), weight * np.float32(np.log(found.floor))
    if found.gate is not None:
        with np.errstate(divide="ignore"):
            log_odds = (found.gate - np.log(weight)).astype(np.float32)
        gate, decides = torch.from_numpy(log_odds).to(device), bool(np.isfinite(log_odds).all())
    listed, values, others = (torch.from_numpy(part).to(device) for part in (items, scores, elsewhere))
    return MemoryScores(listed, values, others, gate, decides)


def mixed(
    network: torch.Tensor,
    log_share: torch.Tensor,
    gate: torch.Tensor,
    network_power: float | torch.Tensor,
    memory_power: float | torch.Tensor,
) -> torch.Tensor:
    """1/alpha * log( g * exp(network)^alpha + (1 - g) * share^beta ), and -inf for what the search has not found.

    Shapes: network, -inf where there is no item, and log_share (B, N), gate (B,), log odds of the network -> (B, N).
    """
    from_network = F.logsigmoid(gate)[:, None] + network_power * network
    from_memory = F.logsigmoid(-gate)[:, None] + memory_power * log_share
    scores = torch.logaddexp(from_network, from_memory) / network_power
    return scores.masked_fill(network == NEG_INF, NEG_INF)
