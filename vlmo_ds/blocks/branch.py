"""A residual branch with its norm: by PyTorch's own kernels, or compiled to fewer (the setting model.compile)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import ScaledLinear
from vlmo_ds.blocks.recompute import norm_again


class FeedForward(nn.Module):
    """A block whose feed-forward branches can be compiled."""

    cheap = True  # outputs of norms are computed again in the backward pass
    compiled = False

    def fed(self, norm: LayerNorm, rest: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """rest(norm(x), *args), x: [..., D]."""
        if self.compiled and torch.is_grad_enabled():
            return compiled_branch()(norm, rest, x, *args)
        with norm_again(norm, x, self.cheap) as normed:
            return rest(normed, *args)


@cache
def compiled_branch() -> Any:
    """One compiled function for all blocks of a process, whose weights are its arguments; for any number of rows."""

    def branch(norm: LayerNorm, rest: nn.Module, x: Tensor, *args: Any) -> Tensor:
        return rest(norm(x), *args)

    return torch.compile(branch, dynamic=True)


def compile_branches(model: nn.Module) -> None:
    """Has the model's feed-forward branches compiled when they first run. What is kept of them for the backward pass is the compiler's
    choice. ValueError where what it needs is missing."""
    # imported here: they take seconds
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "compile is blocks: on a GPU this needs Triton, which is not installed; accepted here: none"
            )
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "compile is blocks: on a CPU this needs g++, which is not installed; accepted here: none"
            ) from None
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.compiled = True
            for part in module.modules():
                if isinstance(part, ScaledLinear) and part.gelu:
                    part.cheap = False
