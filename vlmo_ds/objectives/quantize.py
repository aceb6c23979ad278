"""Vector quantisation on the unit sphere, whose codebook is a moving average (BEiT v2, arXiv:2208.06366, section 2.1).

Dimensions: N vectors, K codes, C width of a code, R vectors that are picked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.rows import mix

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


def places_of(sample_id_B: Tensor, patches: int) -> Tensor:
    """[B * P] int64, at random and the same on every rank: by what patches are put into an order that does not depend on how they lie."""
    place_P = torch.arange(patches, device=sample_id_B.device)
    return mix(mix(sample_id_B)[:, None] + place_P).flatten()


def first_by_place(vector_NC: Tensor, place_N: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(vectors [R, C], places [R]) of the lowest places in order, R = min(N, most)."""
    order_R = place_N.argsort()[:most]
    return vector_NC[order_R], place_N[order_R]


def kmeans(vector_NC: Tensor, codes: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """(codebook [K, C] of unit vectors, how many vectors each code has [K]): spherical k-means, which begins with the first vectors. A code
    that loses its members stays. Where there are fewer vectors than codes, some codes are the same."""
    codebook_KC = vector_NC[torch.arange(codes, device=vector_NC.device) % len(vector_NC)]
    for _ in range(rounds):
        counts_K, sums_KC = members(vector_NC, nearest(vector_NC, codebook_KC), codes)
        codebook_KC = torch.where(counts_K[:, None] == 0, codebook_KC, F.normalize(sums_KC, dim=1))
    return codebook_KC, counts_K


def perplexity(counts_K: Tensor) -> Tensor:
    """exp of the entropy of how often codes are used, 0-d: K where all are used alike, 1 where one has everything."""
    share_K = counts_K / counts_K.sum().clamp(min=1)
    return torch.special.entr(share_K).sum().exp()
