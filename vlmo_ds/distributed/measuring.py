"""Counts the bytes that collectives receive, for tests and benchmarks."""

from __future__ import annotations

import collections
import inspect

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo_ds.distributed.collector import Collector


def away() -> float:
    return (dist.get_world_size() - 1) / dist.get_world_size()


def from_others(output, output_split_sizes=None, **_) -> float:
    sizes = output_split_sizes or [len(output) // dist.get_world_size()] * dist.get_world_size()
    return sum(n for rank, n in enumerate(sizes) if rank != dist.get_rank()) * output.nbytes / max(len(output), 1)


# What a rank receives: an all-reduce is a reduce-scatter and an all-gather.
COLLECTIVES = {
    "all_gather_into_tensor": ("all-gather", lambda output_tensor, **_: output_tensor.nbytes * away()),
    "all_gather": ("all-gather", lambda tensor_list, **_: sum(t.nbytes for t in tensor_list) * away()),
    "reduce_scatter_tensor": ("reduce-scatter", lambda input, **_: input.nbytes * away()),
    "reduce_scatter": ("reduce-scatter", lambda input_list, **_: sum(t.nbytes for t in input_list) * away()),
    "all_reduce": ("all-reduce", lambda tensor, **_: 2 * tensor.nbytes * away()),
    "reduce": ("reduce", lambda tensor, **_: tensor.nbytes * away()),
    "all_to_all_single": ("all-to-all", from_others),
}


def count_collectives() -> collections.Counter:
    """Has to be called before DeepSpeed is imported."""
    wire: collections.Counter = collections.Counter()

    def counted(original, kind, size):
        signature = inspect.signature(original)

        def call(*args, **kwargs):
            wire[kind] += size(**signature.bind(*args, **kwargs).arguments)
            return original(*args, **kwargs)

        return call

    for name, (kind, size) in COLLECTIVES.items():
        setattr(dist, name, counted(getattr(dist, name), kind, size))
    return wire


class OneOfMany(Collector):
    """A stand-in for one rank of many: the rows of the others are given as a tensor."""

    def __init__(self, others: Tensor):
        super().__init__()
        self.others = others

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat((local, self.others))

    def sum_to_owners(self, table: Tensor) -> Tensor:
        return table[: len(table) - len(self.others)]
