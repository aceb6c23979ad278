"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose matrix is brought near to an orthogonal one before it is a step.

DeepSpeed 0.19.8 has one of its own, which this stack cannot use: under ZeRO-1 and 2 each rank keeps the momentum of whole matrices where its
partition has a part of them, in the precision of the gradients, so that no other number of ranks can read it; it clips the finished
step in place of the gradient; and on GPUs it computes in 16 bits. Here momentum is cut as AdamW's moments are, and clipping comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo_ds.distributed.collector import Collector

STEPS, COEFFICIENTS = (
    5,
    (3.4445, -4.7750, 2.0315),
)  # of the iteration, which need not converge
RMS = 0.2  # of an update's elements, as AdamW's have (arXiv:2502.16982, equation 4): one learning rate fits both
TOGETHER = 1 << 26  # elements of matrices that are whole at a time


class Piece(NamedTuple):
    """What this rank has of a matrix: `length` elements, from `start` of the flattened matrix on, `offset` in the tensor that is stepped."""

    shape: torch.Size
    offset: int
    start: int
    length: int


class Muon(torch.optim.AdamW):
    """groups: those with "muon" hold matrices and have one float32 state, exp_avg; all others are AdamW's. momentum: Muon's.

    It steps nothing before `place` has told it where in the tensors it is given (ZeRO's flat ones) the matrices are.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float, fused: bool
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        self.momentum = momentum
        self.matrices = {id(one) for group in self.param_groups if group["muon"] for one in group["params"]}
        self.pieces: dict[int, list[Piece]] | None = None
        self.cut = False

    def place(self, pieces: dict[int, list[Piece]], *, cut: bool) -> None:
        """pieces: by the tensor's id, on every rank of the same matrices in the same order; cut: whether ranks have parts of them."""
        self.pieces, self.cut = pieces, cut

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's has overloads
        if self.pieces is None:
            return
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                self.step_matrices(parameter, self.pieces[id(parameter)], group["lr"], group["weight_decay"])

    def step_matrices(self, parameter: Tensor, pieces: Sequence[Piece], lr: float, decay: float) -> None:
        """parameter: with its gradient; one matrix, or parts of several one after another."""
        gradient = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(parameter)  # type: ignore[union-attr]
        average = self.state[parameter]["exp_avg"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(average, self.momentum).view(-1)  # Nesterov's
        flat = parameter.view(-1).mul_(1 - lr * decay)
        for some in portions(pieces):
            for piece, matrix in zip(some, whole(ahead, some, self.cut), strict=True):
                if piece.length:
                    step = orthogonal(matrix) * (RMS * max(piece.shape) ** 0.5)
                    mine = step.view(-1)[piece.start : piece.start + piece.length].to(flat.device)
                    flat[piece.offset : piece.offset + piece.length].add_(mine, alpha=-lr)


def portions(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The same on every rank, however much of each it has."""
    some: list[Piece] = []
    for piece in pieces:
        if some and sum(one.shape.numel() for one in some) + piece.shape.numel() > TOGETHER:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def whole(flat: Tensor, pieces: Sequence[Piece], cut: bool) -> list[Tensor]:
    """Matrices of which each rank has parts in a flat tensor, on the device. (Every rank has to call.)"""
    where = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else flat.device
    if not cut:
        return [flat[one.offset : one.offset + one.length].view(one.shape).to(where) for one in pieces]
    sizes = [piece.shape.numel() for piece in pieces]
    together = torch.zeros(sum(sizes), device=where)
    parts = together.split(sizes)
    for piece, part in zip(pieces, parts, strict=True):
        part[piece.start : piece.start + piece.length] = flat[piece.offset : piece.offset + piece.length]
    return [part.view(piece.shape) for piece, part in zip(pieces, Collector().sum(together).split(sizes), strict=True)]


def orthogonal(matrix: Tensor) -> Tensor:
    """[R, C] float32 -> [R, C], with the same singular vectors and singular values near 1 (Newton-Schulz, five steps), in float32: in 16 bits it
    would turn what ranks sum in another order into another step."""
    a, b, c = COEFFICIENTS
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT.contiguous() if matrix.shape[0] > matrix.shape[1] else x
