"""Vector quantisation on the unit sphere, whose codebook is a moving average (BEiT v2, arXiv:2208.06366, section 2.1).

Dimensions: N vectors, K codes, C width of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 24  # similarities that are there at a time


def nearest(vector_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """[N] int64: of each vector the code with the greatest inner product, of unit vectors the nearest; of equal ones the first."""
    rows = max(CHUNK // len(codebook_KC), 1)
    return torch.cat([(part @ codebook_KC.T).argmax(1) for part in vector_NC.split(rows)])


def members(vector_NC: Tensor, token_N: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """(counts [K], sums [K, C]) of the vectors by their codes."""
    counts = torch.bincount(token_N, minlength=codes).to(vector_NC.dtype)
    return counts, vector_NC.new_zeros(codes, vector_NC.shape[1]).index_add_(0, token_N, vector_NC)


def moved(codebook_KC: Tensor, counts_K: Tensor, sums_KC: Tensor, decay: float) -> Tensor:
    """The codebook after a step: of each code `decay` of where it was and the rest of the direction of its members' mean, of unit length again.
    A code without members stays.

    The reference normalises the mean of the members, which is the direction of their sum.
    """
    direction_KC = torch.where(counts_K[:, None] == 0, codebook_KC, F.normalize(sums_KC, dim=1))
    return F.normalize(codebook_KC * decay + direction_KC * (1 - decay), dim=1)


def straight_through(vector: Tensor, code: Tensor) -> Tensor:
    """The codes, with the vectors' gradient."""
    return vector + (code - vector).detach()


def commitment(vector: Tensor, code: Tensor) -> Tensor:
    """Squared distance of each element to its code, which has no gradient; the same shape."""
    return (vector - code.detach()).square()
