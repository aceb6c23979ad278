"""A residual branch with its norm: by PyTorch's own kernels, or compiled to fewer (the setting model.compile)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.fold import sent
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import AddRows, ScaledLinear, drop_path, kept
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


Packing = TypeVar("Packing", bound="Packed")


class Packed(Protocol):
    """Where the sequences of a block stand in its packed rows: N that come in, M of them that go on."""

    num_sequences: int
    sequence_M: Tensor  # whose row each is, int64
    on_M: Tensor | None  # which go on, int64; None: all

    def subset(self: Packing, keep_S: Tensor) -> tuple[Packing, Tensor]:
        """That of some sequences alone, bool [S] on the CPU; and which rows theirs are here, [K]. All rows have to go on."""
        ...


class PackedBlock(FeedForward):
    """A block of packed rows, whose branches stochastic depth (arXiv:1603.09382) can leave out."""

    drop_path_rate: float

    def added(self, x_MD: Tensor, branch: Callable[[Tensor, Packing], Tensor], x_ND: Tensor, layout: Packing) -> Tensor:
        """x_MD and a branch of x_ND, which stochastic depth leaves out for some sequences. It is not computed for these, but in the last block
        and where there are no others: its weights have a gradient on every rank."""
        rate = self.drop_path_rate if self.training else 0.0
        if not rate:
            return x_MD + branch(x_ND, layout)
        keep_S = kept(layout.num_sequences, rate)
        if layout.on_M is not None or not keep_S.any():
            return x_MD + drop_path(branch(x_ND, layout), rate, sent(keep_S, x_ND.device)[layout.sequence_M])
        part, rows_K = layout.subset(keep_S)
        return AddRows.apply(x_MD, rows_K, branch(x_ND.index_select(0, rows_K), part), 1 / (1 - rate))


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
