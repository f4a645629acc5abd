"""Several processes that train as one (`torchrun … -m training run …`): who this one is, and what it computes.

All ranks hold the whole network and make the same plan of a step: the same batch, the same random draws. Each computes
its own rows, and the gradients are summed. What compares the rows of a batch with each other is told of all rows. So
the number of ranks changes neither the loss (dropout masks apart) nor what a checkpoint holds.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Terms = dict[str, torch.Tensor]  # what a step logs: scalars without gradient, on the device


@dataclass(frozen=True, slots=True)
class Share:
    """What one pass computes of a step's batch: of its rows every `parts`-th from `part` on (gradient accumulation), of
    those every `world`-th from `rank` on. Rows of one part, on all ranks, see each other: in-batch negatives, balanced
    labels. A share without a row takes row 0, and counts for nothing.

    batch: rows of the whole batch, see `of`. draws: source of all that is random but dropout, equal on all ranks.
    """

    part: int = 0
    parts: int = 1
    rank: int = 0
    world: int = 1
    batch: int = 0
    draws: torch.Generator | None = None

    def of(self, batch: int) -> Share:
        """This share of a batch of so many rows."""
        return replace(self, batch=batch)

    def piece(self, rows: Any) -> Any:
        """The part's rows of a whole batch: array, tensor or list."""
        return rows[self.part :: self.parts] if self.part < len(rows) else rows[:1]

    def own(self, rows: Any) -> Any:
        """This rank's rows of a part: array, tensor or list."""
        return rows[self.rank :: self.world] if self.rank < len(rows) else rows[:1]

    @property
    def rows(self) -> int:
        """Rows of the part on all ranks; at least 1."""
        return max(1, -(-(self.batch - self.part) // self.parts))

    @property
    def places(self) -> torch.Tensor:
        """Where the own rows lie in the part. Shape: (b,) int64."""
        return self.own(torch.arange(self.rows))

    def mean(self, loss: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, Terms]:
        """From means over the own rows to this share's part of the batch's mean: all shares add up to it."""
        if self.parts == self.world == 1:
            return loss, terms
        first = self.part + self.rank * self.parts
        weight = len(range(first, self.batch, self.parts * self.world)) / self.batch
        return loss * weight, {name: value * weight for name, value in terms.items()}

    def rand(self, own: int, *shape: int) -> torch.Tensor:
        """Uniform numbers for the own rows: what a row draws does not depend on who computes it. Shape: (own, ...)."""
        if self.world == 1:
            return torch.rand(own, *shape, generator=self.draws)
        return self.own(torch.rand(self.rows, *shape, generator=self.draws))

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The part's rows, from all ranks, in the part's order; no gradient. Shapes: (b, ...) -> (rows, ...)."""
        if self.world == 1:
            return own
        most = -(-self.rows // self.world)
        padded = torch.cat([own, own[:1].expand(most - len(own), *own.shape[1:])]).contiguous()
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded)
        return torch.stack(everyone, 1).flatten(0, 1)[: self.rows]


WHOLE = Share()


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world`. Rank 0 alone writes files and speaks. device: what the network is computed on."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Rank 0 runs the block, then all others do: what it wrote they find. Its failure ends all of them."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def share(self, part: int, parts: int, name: str) -> Share:
        """The share of a pass whose draws follow from `name`. Seeds dropout too, with masks of each rank's own."""
        torch.manual_seed(zlib.crc32(f"{name}/{part}/{self.rank}".encode()))
        draws = torch.Generator().manual_seed(zlib.crc32(f"{name}/{part}/draws".encode()))
        return Share(part, parts, self.rank, self.world, draws=draws)

    def sum_gradients(self, network: nn.Module) -> None:
        """All gradients in one message: sending them during the backward would save little with networks this small."""
        if self.world == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]  # the same ones on every rank
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_terms(self, terms: Terms) -> dict[str, float]:
        """Over all ranks, as numbers: this waits for the device."""
        values = torch.stack([value.double() for value in terms.values()])
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(terms, values.tolist(), strict=True))


ALONE = Ranks()


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started (gloo on CPUs, nccl on GPUs, one each); without torchrun, nobody."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(device=torch.device(device))
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    # A day: rank 0 may embed and tokenize a large catalogue meanwhile. A dead rank is torchrun's to notice.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
