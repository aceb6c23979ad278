"""Padding that is not computed: texts of different lengths as one matrix of their tokens, for all but attention.

Dimensions: B sequences, L tokens of the longest, N tokens of all together, D width, H heads.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, without waiting for what that has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Placed(torch.autograd.Function):
    """[N, D] as rows of [rows, D], whose others are zeros. torch's index_copy keeps x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, places_N: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places_N)
        return x_ND.new_zeros(rows, x_ND.shape[1]).index_copy_(0, places_N, x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        return grad.index_select(0, places_N), None, None


class Fold:
    """Which places of a padded [B, L] hold tokens. Linear layers and norms work on those alone, [N, D]."""

    def __init__(self, lengths_B: Tensor, length: int):
        self.of(torch.arange(length, device=lengths_B.device)[None] < lengths_B[:, None])

    @classmethod
    def of_mask(cls, mask_BL: Tensor) -> Fold:
        """mask_BL: not zero where there is a token."""
        fold = cls.__new__(cls)
        fold.of(mask_BL.bool())
        return fold

    def of(self, valid_BL: Tensor) -> None:
        self.batch, self.length = valid_BL.shape
        self.valid_BL = valid_BL
        self.places_N = valid_BL.flatten().nonzero().squeeze(1)
        self.count = len(self.places_N)

    @cached_property
    def host_BL(self) -> Tensor:
        """valid_BL on the CPU."""
        return self.valid_BL.cpu()

    def subset(self, which_K: Tensor) -> Fold:
        """That of some sequences, by their numbers, int64 on the CPU."""
        fold, device = Fold.of_mask(self.host_BL[which_K]), self.valid_BL.device
        fold.valid_BL, fold.places_N = sent(fold.valid_BL, device), sent(fold.places_N, device)
        return fold

    @cached_property
    def causal(self) -> Tensor:
        """[L, L] bool: which places a place may look at."""
        column = torch.arange(self.length, device=self.valid_BL.device)
        return column[:, None] >= column[None]

    def folded(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.places_N)

    def padded(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [B, L, D], zeros where there is no token."""
        return Placed.apply(x_ND, self.places_N, self.batch * self.length).view(self.batch, self.length, -1)


class Run(NamedTuple):
    """Consecutive packed rows: tokens of B sequences, `length` of each, or as many as fold says."""

    start: int
    batch: int
    length: int
    fold: Fold | None = None

    @property
    def size(self) -> int:
        """Rows."""
        return self.batch * self.length if self.fold is None else self.fold.count

    def sequences(self, rows_NC: Tensor) -> Tensor:
        """Its rows [N, C] -> [B, length, C], zeros where there is no token."""
        return rows_NC.view(self.batch, self.length, -1) if self.fold is None else self.fold.padded(rows_NC)

    def packed(self, x_BLC: Tensor) -> Tensor:
        """The same back."""
        return x_BLC.reshape(-1, x_BLC.shape[-1]) if self.fold is None else self.fold.folded(x_BLC)

    def subset(self, which_K: Tensor, start: int) -> Run:
        """Some of its sequences, by their numbers, int64 on the CPU; from row `start` on."""
        fold = None if self.fold is None else self.fold.subset(which_K)
        return Run(start, len(which_K), self.length, fold)


def in_sequence(parts: list[Tensor]) -> Tensor:
    """[B, L, C] each -> one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def heads(x_BLD: Tensor, count: int) -> Tensor:
    """[B, L, D] -> [B, H, L, D/H]."""
    return x_BLD.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(out_BHLC: Tensor) -> Tensor:
    """[B, H, L, D/H] -> [B, L, D]."""
    return out_BHLC.transpose(1, 2).flatten(2)
