"""The collector: everything that crosses ranks in the model's path.

The number of ranks is not a hyperparameter: the loss and gradient of a global batch are the same on any number of
ranks, up to the order of floating-point sums. DeepSpeed averages gradients over ranks, so a loss that is to be a mean
over the global batch is written on each rank as `local sum / global count * world_size` (`global_mean`), and `gather`
sends back the whole gradient of the gathered rows, not the part that one rank happens to see.

This is the only file of the model's path that calls torch.distributed. Without an initialised process group it is the
one-rank case of the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.clock import timed


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension; backward is the reduce-scatter that sums every rank's gradient."""

    @staticmethod
    def forward(ctx, local: Tensor, group) -> Tensor:
        ctx.group = group
        out = local.new_empty((dist.get_world_size(group) * local.shape[0], *local.shape[1:]))
        with timed("all_gather_into_tensor"):
            dist.all_gather_into_tensor(out, local.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return summed_to_owners(grad, ctx.group), None


def summed_to_owners(table: Tensor, group) -> Tensor:
    local = table.new_empty(len(table) // dist.get_world_size(group), *table.shape[1:])
    with timed("reduce_scatter_tensor"):
        dist.reduce_scatter_tensor(local, table.contiguous(), group=group)
    return local


class _Fetch(torch.autograd.Function):
    """Rows of a distributed table; backward sends each row's gradient to the rank that has it, which adds them up."""

    @staticmethod
    def forward(ctx, table: Tensor, collector: Collector, wanted: Tensor) -> Tensor:
        batch = len(table)
        every_WB = collector.gather(wanted).view(collector.world_size, batch).cpu()
        owner_WB = every_WB // batch
        asked = [
            every_WB[rank][owner_WB[rank] == collector.rank] - collector.rank * batch for rank in range(len(every_WB))
        ]
        ctx.sent = torch.cat(asked).to(table.device)  # rows of this rank, by who asks for them
        ctx.send_sizes = [len(rows) for rows in asked]
        mine = owner_WB[collector.rank]
        ctx.receive_sizes = [int((mine == rank).sum()) for rank in range(len(every_WB))]
        ctx.order = mine.argsort(stable=True).to(table.device)  # received rows come by their owner
        ctx.group, ctx.batch = collector.group, batch
        received = table.new_empty(batch, *table.shape[1:])
        with timed("all_to_all_single"):
            dist.all_to_all_single(received, table[ctx.sent], ctx.receive_sizes, ctx.send_sizes, group=ctx.group)
        return torch.empty_like(received).index_copy_(0, ctx.order, received)

    @staticmethod
    def backward(ctx, grad: Tensor):
        returned = grad.new_empty(len(ctx.sent), *grad.shape[1:])
        with timed("all_to_all_single"):
            dist.all_to_all_single(returned, grad[ctx.order], ctx.send_sizes, ctx.receive_sizes, group=ctx.group)
        return grad.new_zeros(ctx.batch, *grad.shape[1:]).index_add_(0, ctx.sent, returned), None, None


class Collector:
    """Collectives over one process group (default: all ranks). Every rank calls the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size(group) if self.distributed else 1
        self.rank = dist.get_rank(group) if self.distributed else 0
        # Gets what this rank gives to gather and sum (training.bits).
        self.hears: Callable[[Tensor], None] | None = None

    def gather(self, local: Tensor) -> Tensor:
        """[B, ...] of each rank -> [W*B, ...] in rank order, differentiable. B must be the same on every rank."""
        if self.hears:
            self.hears(local)
        return local if self.world_size == 1 else _Gather.apply(local, self.group)

    def sum_to_owners(self, table: Tensor) -> Tensor:
        """[W*B, ...] of each rank -> the sum over ranks of this rank's rows, [B, ...], without gradient."""
        return table if self.world_size == 1 else summed_to_owners(table, self.group)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        if self.hears:
            self.hears(value)
        total = value.detach().clone()
        if self.world_size > 1:
            with timed("all_reduce"):
                dist.all_reduce(total, group=self.group)
        return total

    def global_mean(self, local_sum: Tensor, local_count: Tensor) -> Tensor:
        """A rank's share of a mean over the global batch, times the number of ranks.

        Averaged over ranks (which is what DeepSpeed does with gradients) it is the exact global mean. A global
        count of 0 gives 0.
        """
        count = self.sum(local_count.to(local_sum.dtype)).clamp(min=1)
        return local_sum / count * self.world_size

    def barrier(self) -> None:
        if self.world_size > 1:
            with timed("barrier"):
                dist.barrier(group=self.group)

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's Python object, on every rank."""
        box = [value]
        if self.world_size > 1:
            with timed("broadcast_object_list"):
                dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def attempt_on_rank0(self, action: Callable[[], object], *errors: type[Exception]) -> tuple[object, str | None]:
        """(rank 0's result, or the message of one of these errors), on every rank, so that all go on or all stop."""
        outcome: tuple[object, str | None] = (None, None)
        if self.rank == 0:
            heartbeat.beat("what rank 0 does for all")
            try:
                outcome = (action(), None)
            except errors as error:
                outcome = (None, str(error))
        with heartbeat.waiting("waiting for rank 0"):
            return self.from_rank0(outcome)

    def broadcast(self, value: Tensor) -> None:
        """Gives every rank rank 0's values, in place."""
        if self.world_size > 1:
            where = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
            moved = value.to(where)
            with timed("broadcast"):
                dist.broadcast(moved, src=0, group=self.group)
            if moved is not value:
                value.copy_(moved)

    def each_rank(self, value: object) -> list:
        """Every rank's Python object, in rank order, on every rank."""
        found: list = [value] * self.world_size
        if self.world_size > 1:
            with heartbeat.waiting(), timed("all_gather_object"):
                dist.all_gather_object(found, value, group=self.group)
        return found

    def first_row(self, local_rows: int) -> int:
        """Global index of this rank's first row."""
        return self.rank * local_rows

    def fetch(self, table: Tensor, wanted: Tensor) -> Tensor:
        """Rows of a distributed table with their gradient: only the rows asked for travel, in one all-to-all.

        table: [B, ...], this rank's rows of a table of W*B rows; wanted: [B] int64, global row numbers -> [B, ...].
        """
        return table[wanted] if self.world_size == 1 else _Fetch.apply(table, self, wanted)

    def exchange(self, tables: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
        """Fetches rows of distributed tables: only the rows asked for travel, in one all-to-all of bytes.

        tables[t]: [B, ...], this rank's rows of a table of W*B rows, any dtypes; wanted[t]: [B] int64, global row
        numbers. Returns for each table the wanted rows, [B, ...].
        """
        if self.world_size == 1:
            return [table[index] for table, index in zip(tables, wanted, strict=True)]
        batch = len(tables[0])
        # The split sizes below are host numbers, so the host has to know what every rank wants.
        every = self.gather(torch.cat(list(wanted))).view(self.world_size, len(tables), batch).cpu()
        device = tables[0].device
        flat = [table.reshape(batch, -1).view(torch.uint8) for table in tables]
        owner = every // batch

        send, send_sizes = [], []
        for destination in range(self.world_size):
            size = 0
            for rows, index, home in zip(flat, every[destination], owner[destination], strict=True):
                mine = index[home == self.rank] - self.rank * batch
                send.append(rows[mine.to(device)].flatten())
                size += send[-1].numel()
            send_sizes.append(size)
        widths = [rows.shape[1] for rows in flat]
        counts = [
            [int((owner[self.rank, t] == source).sum()) for t in range(len(flat))] for source in range(self.world_size)
        ]
        receive_sizes = [sum(n * w for n, w in zip(row, widths, strict=True)) for row in counts]
        received = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
        with timed("all_to_all_single"):
            dist.all_to_all_single(received, torch.cat(send), receive_sizes, send_sizes, group=self.group)

        out = [torch.empty_like(rows) for rows in flat]
        start = 0
        for source in range(self.world_size):
            for t, width in enumerate(widths):
                rows = received[start : start + counts[source][t] * width].view(-1, width)
                out[t][(owner[self.rank, t] == source).to(device)] = rows
                start += rows.numel()
        return [o.view(table.dtype).view_as(table) for o, table in zip(out, tables, strict=True)]
