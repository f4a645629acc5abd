"""What a network's lists and a model's shares of the items propose together, for a gate to mix (`training/join.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.accuracy.views import Lists
from benchmarks.accuracy.walk_inputs import Read, Walkers
from training.join import LEAST_LOG, Proposals

BEAM = 50  # what the network finds, and as many of the model's best, are ranked together


def propose(users: Walkers, read: Read, lists: Lists, items: int) -> list[Proposals]:
    """What network and model propose, for each form of the model. lists: of the network. items: of the catalogue."""
    parts = []
    for index in users.batches():
        begin, found = users.begin(index, items), torch.from_numpy(lists.items[index])
        network = torch.full((len(index), items + 1), LEAST_LOG)  # what a list lacks goes to the last column
        network = network.scatter(1, found.where(found >= 0, items), torch.from_numpy(lists.log_p[index]))[:, :-1]
        network = network.masked_fill(begin.barred, -torch.inf)
        best = network.topk(min(BEAM, items)).indices
        parts.append([_proposed(network, best, share, users, index) for share in read(begin)])
    return [_joined(form) for form in zip(*parts, strict=True)]


def _proposed(
    network: torch.Tensor, best: torch.Tensor, share: torch.Tensor, users: Walkers, index: np.ndarray
) -> Proposals:
    """best: the network's items. Shapes: network, log P, and share (B, I), best (B, N)."""
    item = torch.cat([best, share.topk(best.shape[1]).indices], 1).sort(1).values
    log_p, log_share = network.gather(1, item), share.gather(1, item).log()
    nothing = (log_p <= LEAST_LOG) & (log_share == -torch.inf)
    nothing[:, 1:] |= item[:, 1:] == item[:, :-1]
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
    support, known = users.support[index], np.isfinite(users.support[index])
    columns = [np.where(known, support, 0), share.amax(1), entropy, users.log_length[index], network.amax(1)]
    return Proposals(
        log_p.masked_fill(nothing, -torch.inf).numpy(),
        log_share.masked_fill(nothing, -torch.inf).numpy(),
        ((item == users.target[index, None]) & ~nothing).numpy(),
        np.stack([np.asarray(column, np.float64) for column in columns], 1),
        known,
    )


def _joined(parts: Sequence[Proposals]) -> Proposals:
    names = ("network", "log_share", "hit", "features", "known")
    return Proposals(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
