"""Activations that are computed again in the backward pass in place of being kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """How the blocks of a stack keep their activations: every n-th block's are computed again in the backward pass."""

    def __init__(self, every: int):
        self.every = every
        self.offload = False  # keep the inputs of recomputed blocks in host memory

    def __call__(self, block: nn.Module, index: int, x: Tensor, *args: Any) -> Tensor:
        if not (self.every and block.training and index % self.every == 0):
            return block(x, *args)
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():
            return checkpoint(block, x, *args, use_reentrant=False)
