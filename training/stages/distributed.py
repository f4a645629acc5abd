"""Several processes that train as one (`torchrun … -m training run …`), and the rows of a batch that each computes.

All processes hold the whole network and make the same plan of a step: the same batch, the same random draws. Each
computes its own rows, and the gradients are summed. Losses that compare the rows of a batch with each other see all of
them. So the number of processes changes neither the loss (dropout masks apart) nor what a checkpoint holds.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

Terms = dict[str, torch.Tensor]  # what a step logs: scalars without gradient, on the device


@dataclass(frozen=True, slots=True)
class BatchShard:
    """What one forward pass computes of a step's batch.

    The batch is split into `parts` micro-batches (gradient accumulation), of which this is `part`: every `parts`-th
    row. A micro-batch is split over `world` processes, of which this is `rank`. The rows of a micro-batch see each
    other on all processes: in-batch negatives, balanced labels. A shard without a row takes row 0, with weight 0.

    batch: rows of the whole batch, see `of`. draws: source of all that is random but dropout, equal on all processes.
    """

    part: int = 0
    parts: int = 1
    rank: int = 0
    world: int = 1
    batch: int = 0
    draws: torch.Generator | None = None

    def of(self, batch: int) -> BatchShard:
        """This shard of a batch of so many rows."""
        return replace(self, batch=batch)

    def micro_batch(self, rows: Any) -> Any:
        """The micro-batch's rows of a whole batch: array, tensor or list."""
        return rows[self.part :: self.parts] if self.part < len(rows) else rows[:1]

    def local(self, rows: Any) -> Any:
        """This process's rows of a micro-batch: array, tensor or list."""
        return rows[self.rank :: self.world] if self.rank < len(rows) else rows[:1]

    @property
    def rows(self) -> int:
        """Rows of the micro-batch on all processes; at least 1."""
        return max(1, -(-(self.batch - self.part) // self.parts))

    @property
    def local_index(self) -> torch.Tensor:
        """Positions of the local rows in the micro-batch. Shape: (b,) int64."""
        index: torch.Tensor = self.local(torch.arange(self.rows))
        return index

    def mean(self, loss: torch.Tensor, terms: Terms, counts: np.ndarray | None = None) -> tuple[torch.Tensor, Terms]:
        """From means over the local rows to this shard's part of the batch's mean: all shards add up to it.

        counts: (batch,) the examples of each row of the whole batch, over which the means are; None: one each.
        """
        if self.parts == self.world == 1:
            return loss, terms
        counts = np.ones(self.batch) if counts is None else counts
        weight = float(counts[self.part + self.rank * self.parts :: self.parts * self.world].sum() / counts.sum())
        return loss * weight, {name: value * weight for name, value in terms.items()}

    def rand(self, local: int, *shape: int) -> torch.Tensor:
        """Uniform numbers for the local rows: what a row draws does not depend on which process computes it.

        Shape: (local, ...).
        """
        if self.world == 1:
            return torch.rand(local, *shape, generator=self.draws)
        numbers: torch.Tensor = self.local(torch.rand(self.rows, *shape, generator=self.draws))
        return numbers

    def sum(self, local: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place; no gradient."""
        if self.world > 1:
            dist.all_reduce(local)
        return local

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The micro-batch's rows, from all processes, in its order; no gradient. Shapes: (b, ...) -> (rows, ...)."""
        if self.world == 1:
            return local
        most = -(-self.rows // self.world)
        padded = torch.cat([local, local[:1].expand(most - len(local), *local.shape[1:])]).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded)
        return torch.stack(gathered, 1).flatten(0, 1)[: self.rows]


WHOLE_BATCH = BatchShard()


@dataclass(frozen=True, slots=True)
class Process:
    """This process among `world`. Only rank 0 writes files and logs. device: what the network is computed on."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Blocks until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Rank 0 runs the block before the others, which then find what it wrote. If it fails, all processes end."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def shard(self, part: int, parts: int, name: str) -> BatchShard:
        """The shard of a pass whose draws follow from `name`. Also seeds dropout, with other masks on each process."""
        torch.manual_seed(zlib.crc32(f"{name}/{part}/{self.rank}".encode()))
        draws = torch.Generator().manual_seed(zlib.crc32(f"{name}/{part}/draws".encode()))
        return BatchShard(part, parts, self.rank, self.world, draws=draws)

    def sum_gradients(self, network: nn.Module) -> None:
        """All gradients in one message: sending them during the backward would save little with networks this small."""
        if self.world == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]  # the same ones on every process
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_terms(self, terms: Terms) -> dict[str, float]:
        """Sums over all processes, as numbers: this waits for the device."""
        values = torch.stack([value.double() for value in terms.values()])
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(terms, values.tolist(), strict=True))


SINGLE_PROCESS = Process()


@contextmanager
def join_processes(device: str) -> Iterator[Process]:
    """Joins the processes that torchrun started (gloo on CPUs, nccl on GPUs, one GPU each). Without torchrun there is
    this one alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Process(device=torch.device(device))
        return
    on = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(on)
    # A day: meanwhile rank 0 may embed and tokenize a large catalogue. torchrun notices a process that died.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), on)
    finally:
        dist.destroy_process_group()
