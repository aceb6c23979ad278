"""Activations that are computed again in the backward pass in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vlmo_ds.blocks.kernels import LayerNorm


class Recomputed:
    """How the blocks of a stack keep their activations (the setting model.recompute). cheap: what costs little beside its size is computed
    again (attention's probabilities, outputs of norms and of GELU); every: n for every n-th block as a whole, 0 for none."""

    def __init__(self, cheap: bool = True, every: int = 0):
        self.cheap, self.every = cheap, every
        self.offload = False  # keep the inputs of recomputed blocks in host memory

    def __call__(self, block: nn.Module, index: int, x: Tensor, *args: Any) -> Tensor:
        if not (block.training and self.whole(index)):
            return block(x, *args)
        block.cheap = False  # type: ignore[assignment]  # what norm_again has in it would stay in memory
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():
            return checkpoint(block, x, *args, use_reentrant=False)

    def whole(self, index: int) -> bool:
        """Whether all of that block is computed again."""
        return bool(self.every) and index % self.every == 0

    def tell(self, model: nn.Module) -> None:
        """Modules that can keep something or compute it again have `cheap`."""
        for module in model.modules():
            if hasattr(module, "cheap"):
                module.cheap = self.cheap  # type: ignore[assignment]  # a module's attribute may be anything


@contextmanager
def norm_again(norm: LayerNorm, x: Tensor, cheap: bool) -> Iterator[Tensor]:
    """Gives norm(x), which is not kept for the backward pass by what is computed from it in the context, but computed again from x."""
    if not (cheap and torch.is_grad_enabled()):
        yield norm(x)
        return
    normed, weight, bias = norm(x, copies=True)
    address, size = normed.data_ptr(), normed.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        whole = tensor.data_ptr() == address and tensor.numel() == size and tensor.is_contiguous()
        return tensor.shape if whole else tensor  # a linear layer has sequences as rows of one matrix

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return norm.kernel(x.detach(), weight, bias, norm.eps).view(packed)

    with saved_tensors_hooks(pack, unpack):
        yield normed


@contextmanager
def gelu_norm_again(norm: LayerNorm, x: Tensor, cheap: bool) -> Iterator[Tensor]:
    """Gives norm(gelu(x)), of which the backward pass keeps x alone: both are computed again from it."""
    if not (cheap and torch.is_grad_enabled()):
        yield norm(F.gelu(x))
        return
    activated = F.gelu(x)
    again: dict[int, Callable[[], Tensor]] = {activated.data_ptr(): lambda: F.gelu(x.detach())}

    def pack(tensor: Tensor) -> Tensor | tuple[int, torch.Size]:
        whole = tensor.data_ptr() in again and tensor.numel() == x.numel() and tensor.is_contiguous()
        return (tensor.data_ptr(), tensor.shape) if whole else tensor

    def unpack(packed: Tensor | tuple[int, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else again[packed[0]]().view(packed[1])

    with saved_tensors_hooks(pack, unpack):
        normed, weight, bias = norm(activated, copies=True)
        again[normed.data_ptr()] = lambda: norm.kernel(F.gelu(x.detach()), weight, bias, norm.eps)
        yield normed
