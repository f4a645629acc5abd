"""Fits how a bundle's item memory joins its network: the gate of `serving/search/memory.py`, on validation users.

Four ways are tried: the network alone, the memory alone, one gate for all, and a gate that follows from features. A
gate and its two powers are fitted by the likelihood of the targets among what was proposed. Each way is judged by
NDCG@10 on users that it was not fitted on, mixed with a memory that they did not choose (`training/memory.py`); the
best way is then fitted on all validation users. The quality that is reported was judged with the way itself chosen by
the other users. What stays in-sample: validation also kept the network's best weights. [open: not in the paper.]

The ranks are those of what the beam and the memory propose together, which one search without steps finds per user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from serving.items.neighbours import Neighbours
from serving.search.memory import look_up, mixed
from serving.search.ranker import Ranker, of_some
from serving.types import GATE_FEATURES, BundleSettings, EventData, Gate
from training.memory import FittedMemory
from training.metrics import ndcg

PARTS = 5  # of the validation users, for cross-fitting the gate
# The memory's share decides, and the network orders what the memory does not know: 2e-9 of a probability.
MEMORY_ALONE = Gate(-20.0)
LEAST_LOG = -1e4  # of a probability while a gate is fitted: an infinite one has no gradient
# The logarithm of a power, up or down. A line search may try any, and e^88 overflows the float32 of what serves. Fits
# end within 5, where a higher power only picks its part's first item; on their way some try 35, which is left to them.
MOST_LOG_POWER = 50.0
NETWORK, MEMORY, CONSTANT, GATED = WAYS = ("network alone", "memory alone", "one gate for all", "gate by features")


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a search proposes to U users, N items each.

    network, log_share: (U, N) float32, log P and log of the memory's share, -inf where there is no item. hit: (U, N)
    bool, the target. features: (U, F) float64, as GATE_FEATURES lists them. known: (U,) bool, whether the memory knows
    anything of the history.
    """

    network: np.ndarray
    log_share: np.ndarray
    hit: np.ndarray
    features: np.ndarray
    known: np.ndarray

    def of(self, users: np.ndarray) -> Proposals:
        return Proposals(*(part[users] for part in (self.network, self.log_share, self.hit, self.features, self.known)))

    def ndcg(self, gate: Gate | None) -> np.ndarray:
        """NDCG@10 per user; None: the network alone. An equal score ranks ahead of the target. Shape: (U,).

        NaN is ahead of nothing, so a user with a score that is no number would have the best of ranks: it is a miss.
        """
        scores = self.network
        if gate is not None:
            log_odds = gate.intercept + self.features @ np.array(list(gate.coefficients.values()))
            log_odds = torch.from_numpy(np.where(self.known, log_odds, np.inf))
            parts = torch.from_numpy(self.network), torch.from_numpy(self.log_share)
            scores = mixed(*parts, log_odds, gate.network_power, gate.memory_power).numpy()
        found = self.hit.any(1) & (scores < np.inf).all(1)
        own = np.where(self.hit, scores, -np.inf).max(1)
        rank = (scores >= own[:, None]).sum(1) - 1
        return ndcg(np.where(found, rank, np.inf))


@dataclass(frozen=True, slots=True)
class Join:
    """The way that won. settings: the bundle's, with the gate fitted on all validation users.

    folds: positions among the sampled validation users, and the memory and gate to judge them with. report: for the
    bundle's `about`.
    """

    settings: BundleSettings
    folds: tuple[tuple[np.ndarray, Neighbours, Gate], ...]
    report: dict[str, object]


@dataclass(frozen=True, slots=True)
class CrossFittedRanker:
    """Ranks the sampled validation users, each with a memory and a gate that others chose. See `Ranker.rank`."""

    ranker: Ranker
    join: Join

    @property
    def settings(self) -> BundleSettings:
        return self.ranker.settings

    def rank(
        self,
        histories: Sequence[np.ndarray],
        steps: int,
        beam: int,
        *,
        exclude_seen: bool = False,
        events: Sequence[EventData] | None = None,
    ) -> np.ndarray:
        parts = []
        for users, neighbours, gate in self.join.folds:
            ranker = replace(self.ranker, neighbours=neighbours, settings=replace(self.settings, gate=gate))
            own = [histories[user] for user in users]
            parts.append(ranker.rank(own, steps, beam, exclude_seen=exclude_seen, events=of_some(events, users)))
        ranked = np.empty_like(np.concatenate(parts))
        ranked[np.concatenate([users for users, _, _ in self.join.folds])] = np.concatenate(parts)
        return ranked


def fit_join(
    ranker: Ranker,
    memory: FittedMemory,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    beam: int,
    candidates: int,
    *,
    exclude_seen: bool,
    events: Sequence[EventData] | None = None,
) -> Join:
    """The join of a network with its memory, on the validation users that `memory` was fitted on, in their order.

    candidates: how many of the memory's best items join those that the beam finds. exclude_seen: whether those that
    judge exclude a history's items. events: of each history. Takes one search per user.
    """
    settings = replace(ranker.settings, neighbours_weight=1.0, dense_candidates=candidates)
    proposals = _proposals(replace(ranker, settings=settings), memory, histories, target, beam, exclude_seen, events)
    users = np.arange(len(target))
    parts = [users[first::PARTS] for first in range(min(PARTS, len(users)))]
    ways = {way: float(judged(proposals, way, parts).mean()) for way in WAYS}
    chosen = max(WAYS, key=lambda way: ways[way])  # the first of equals
    cross_fitted = np.concatenate([_chosen_by_others(proposals, users, part) for part in parts])
    folds = []
    for part, neighbours in memory.folds:
        gate = fit_gate(proposals.of(np.setdiff1d(users, part)), chosen)
        folds.append((part, neighbours, gate or MEMORY_ALONE))  # no gate: the memory is not asked at all
    if chosen == NETWORK:  # a request may still have the memory joined
        settings = replace(settings, neighbours_weight=0.0)
    gate = fit_gate(proposals, CONSTANT if chosen == NETWORK else chosen)
    report = {
        "way": chosen,
        "valid_ndcg@10_cross_fitted": {way: round(value, 5) for way, value in ways.items()},
        "valid_ndcg@10_with_the_way_cross_fitted": round(float(cross_fitted.mean()), 5),
        "gate": asdict(gate) if gate else None,
    }
    return Join(replace(settings, gate=gate), tuple(folds), report)


def _chosen_by_others(proposals: Proposals, users: np.ndarray, part: np.ndarray) -> np.ndarray:
    """NDCG@10 of some users under the way and the gate that all others choose. Shape: (part,)."""
    others = proposals.of(np.setdiff1d(users, part))
    within = np.arange(len(others.known))
    inner = [within[first::PARTS] for first in range(min(PARTS, len(within)))]
    way = max(WAYS, key=lambda way: float(judged(others, way, inner).mean()))
    return proposals.of(part).ndcg(fit_gate(others, way))


def judged(proposals: Proposals, way: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """NDCG@10 per user, each part of the users under a gate that was fitted on the rest. Shape: (U,)."""
    users, found = np.arange(len(proposals.known)), np.empty(len(proposals.known))
    for part in parts:
        rest = np.setdiff1d(users, part) if len(parts) > 1 else users
        found[part] = proposals.of(part).ndcg(fit_gate(proposals.of(rest), way))
    return found


def fit_gate(proposals: Proposals, way: str) -> Gate | None:
    """The likeliest gate; None for the network alone.

    Where it cannot be told in numbers, as for a network that gives none, the next simpler way's.
    """
    if way in (NETWORK, MEMORY):
        return MEMORY_ALONE if way == MEMORY else None
    useful = proposals.of(np.flatnonzero(proposals.hit.any(1) & proposals.known))  # no gate changes the others' ranks
    if not len(useful.known):
        return Gate(0.0)
    mean, deviation = useful.features.mean(0), useful.features.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    standard = torch.from_numpy((useful.features - mean) / deviation)
    intercept, (network_power, memory_power), slopes = _likeliest(useful, standard if way == GATED else standard[:, :0])
    powers = {"network_power": network_power, "memory_power": memory_power}
    if not np.isfinite([intercept, *powers.values(), *slopes]).all():
        return fit_gate(proposals, CONSTANT if way == GATED else MEMORY)
    if way == CONSTANT:
        return Gate(intercept, **powers)
    slopes = slopes / deviation
    return Gate(intercept - float(slopes @ mean), **dict(zip(GATE_FEATURES, slopes.tolist(), strict=True)), **powers)


def _likeliest(proposals: Proposals, features: torch.Tensor) -> tuple[float, list[float], np.ndarray]:
    """Intercept, powers of network and memory, and slopes, by the likelihood of the targets among what was proposed.

    All have a normal prior, the powers by their logarithms, so that few users are not believed too much. Seen from each
    part's best items, the intercept hardly depends on the powers. Shape: features (U, F).
    """
    parts = [torch.from_numpy(part).double().clamp(min=LEAST_LOG) for part in (proposals.network, proposals.log_share)]
    best = torch.stack([part.amax(1).mean() for part in parts])
    network, log_share = (part - own for part, own in zip(parts, best, strict=True))
    is_other = torch.from_numpy(~proposals.hit)
    fitted = torch.zeros(3 + features.shape[1], dtype=torch.float64, requires_grad=True)
    precision = torch.tensor([0.01] + [1.0] * (len(fitted) - 1), dtype=torch.float64)
    optimizer = torch.optim.LBFGS([fitted], max_iter=50, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        powers = fitted[1:3].clamp(-MOST_LOG_POWER, MOST_LOG_POWER).exp()
        scores = powers[0] * mixed(network, log_share, fitted[0] + features @ fitted[3:], powers[0], powers[1])
        # Not LEAST_LOG: high powers bring scores below it, and a target that they make improbable would count as found.
        found = scores.masked_fill(is_other, -torch.inf).logsumexp(1) - scores.logsumexp(1)
        value = ((precision * fitted**2).sum() - found.sum()) / len(features)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    values = fitted.detach()
    powers = values[1:3].clamp(-MOST_LOG_POWER, MOST_LOG_POWER).exp()
    intercept = values[0] - powers[0] * best[0] + powers[1] * best[1]
    return float(intercept), powers.tolist(), values[3:].numpy()


def _proposals(
    ranker: Ranker,
    memory: FittedMemory,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    beam: int,
    exclude_seen: bool,
    events: Sequence[EventData] | None,
) -> Proposals:
    """Searches once per user, with the memory that judges the user."""
    asks = Gate(0.0, confidence=1.0)  # so that the search measures its confidence
    parts, order = [], []
    for users, neighbours in memory.folds:
        own = replace(ranker, neighbours=neighbours, settings=replace(ranker.settings, gate=asks))
        for index in own.batches([histories[user] for user in users]):
            chosen = users[index]
            batch = [histories[user] for user in chosen]
            of_batch = of_some(events, chosen)
            parts.append(_batch_proposals(own, neighbours, batch, target[chosen], beam, exclude_seen, of_batch))
            order.append(chosen)
    width = max(part.network.shape[1] for part in parts)
    back = np.argsort(np.concatenate(order))

    def whole(name: str) -> np.ndarray:
        values = [getattr(part, name) for part in parts]
        if name in ("network", "log_share", "hit"):
            empty = False if name == "hit" else -np.inf
            values = [np.pad(v, ((0, 0), (0, width - v.shape[1])), constant_values=empty) for v in values]
        return np.concatenate(values)[back]

    return Proposals(*(whole(name) for name in ("network", "log_share", "hit", "features", "known")))


def _batch_proposals(
    ranker: Ranker,
    neighbours: Neighbours,
    histories: Sequence[np.ndarray],
    target: np.ndarray,
    beam: int,
    exclude_seen: bool,
    events: Sequence[EventData] | None,
) -> Proposals:
    item, network, confidence = ranker.propose(histories, 0, beam, exclude_seen=exclude_seen, events=events)
    found = look_up(neighbours, ranker.settings, histories, events)
    _, features = neighbours.shares(histories, ranker.settings.max_items, events)
    known = np.isfinite(features["support"])
    columns = [np.where(known, features[name], 0.0) for name in GATE_FEATURES[:-1]]
    is_item = network > -np.inf
    with np.errstate(divide="ignore"):
        log_share = np.log(np.where(is_item, found.shares.of(item), np.float32(0)))
    is_target = is_item & (item == target[:, None])
    return Proposals(network, log_share, is_target, np.stack([*columns, confidence], 1), known)
