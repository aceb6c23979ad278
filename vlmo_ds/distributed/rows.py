"""One rank's rows of the global contrastive logits, in chunks of columns: never more than [B, chunk] at once.

Dimensions: B rows of this rank, G rows of the global batch, D width. All arithmetic is in the features' dtype, which is
float32 in training (float64 in parity checks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_ds.config import RecipeError

CHUNK = 8192


class _ContrastiveRows(torch.autograd.Function):
    """Sum over rows of cross-entropy(scale * q @ k.T, label), with logits recomputed in the backward."""

    @staticmethod
    def forward(ctx, q_BD: Tensor, k_GD: Tensor, scale: Tensor, label_B: Tensor, chunk: int):
        lse_B = torch.full((len(q_BD),), float("-inf"), dtype=q_BD.dtype, device=q_BD.device)
        best_B, best_index_B = lse_B.clone(), torch.zeros_like(label_B)
        for start in range(0, len(k_GD), chunk):
            logits = scale * (q_BD @ k_GD[start : start + chunk].t())
            lse_B = torch.logaddexp(lse_B, logits.logsumexp(1))
            value, index = logits.max(1)
            better = value > best_B
            best_B = torch.where(better, value, best_B)
            best_index_B = torch.where(better, index + start, best_index_B)
        cosine_B = (q_BD * k_GD[label_B]).sum(1)
        ctx.save_for_backward(q_BD, k_GD, scale, label_B, lse_B, cosine_B)
        ctx.chunk = chunk
        correct = (best_index_B == label_B).sum().to(q_BD.dtype)
        ctx.mark_non_differentiable(correct)
        return (lse_B - scale * cosine_B).sum(), correct

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        q_BD, k_GD, scale, label_B, lse_B, cosine_B = ctx.saved_tensors
        positive = k_GD[label_B]
        grad_q = -scale * positive
        grad_k = torch.zeros_like(k_GD).index_add_(0, label_B, -scale * q_BD)
        grad_scale = -cosine_B.sum()
        for start in range(0, len(k_GD), ctx.chunk):
            k = k_GD[start : start + ctx.chunk]
            cosine = q_BD @ k.t()
            p = (scale * cosine - lse_B[:, None]).exp()
            grad_q += scale * (p @ k)
            grad_k[start : start + ctx.chunk] += scale * (p.t() @ q_BD)
            grad_scale = grad_scale + (p * cosine).sum()
        return grad * grad_q, grad * grad_k, grad * grad_scale, None, None


def contrastive_rows(
    q_BD: Tensor, k_GD: Tensor, scale: Tensor, label_B: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of this rank's rows against all columns (InfoNCE; CLIP, arXiv:2103.00020).

    q_BD: features of this rank; k_GD: features of all ranks; scale: 0-d; label_B: column of each row's own pair.
    Returns (sum of the row losses, number of rows whose largest logit is their own pair). Memory: O(B*chunk + G*D).
    """
    with torch.autocast(q_BD.device.type, enabled=False):  # in 16 bits the logits of close pairs are all the same
        return _ContrastiveRows.apply(q_BD, k_GD, scale, label_B, chunk)


_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele et al., OOPSLA 2014): a bijection whose output bits look random."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def gumbel_noise(seed: int, query_id_B: Tensor, candidate_id_C: Tensor) -> Tensor:
    """[B, C] float32 Gumbel noise, a pure function of (seed, query id, candidate id): the same on every rank."""
    golden = _signed(0x9E3779B97F4A7C15)
    query = mix(mix(query_id_B + _signed(seed * 0x9E3779B97F4A7C15 + 1)) + golden)
    bits = mix(query[:, None] ^ mix(candidate_id_C + golden)[None, :])
    uniform = (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
    return -(-uniform.log()).log()


@torch.no_grad()
def sample_negatives(
    q_BD: Tensor,
    k_GD: Tensor,
    scale: Tensor,
    *,
    seed: int,
    query_id_B: Tensor,
    candidate_id_G: Tensor,
    query_image_B: Tensor,
    candidate_image_G: Tensor,
    floor: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """One hard negative per row, drawn from the softmax of its logits over all candidates of another image.

    floor: what is added to each candidate's share of the softmax (over all candidates, as the reference of BLIP does).

    The Gumbel-max trick (Gumbel 1954): argmax(logit + noise) is a draw from softmax(logit), needs no normalisation,
    works chunk by chunk and cannot underflow. Candidates with the query's image id are left out: another caption of
    the same image is not a negative. Returns [B] int64 global row numbers.

    Raises RecipeError when all candidates show one image (the same on every rank, so no rank is left waiting).
    """
    if bool((candidate_image_G == candidate_image_G[0]).all()):
        raise RecipeError(
            f"itm needs a negative, but all {len(candidate_image_G)} pairs of the ranks' micro-batches have image_id "
            f"{int(candidate_image_G[0])}: use micro-batches of at least two different images"
        )
    best_B = torch.full((len(q_BD),), float("-inf"), dtype=q_BD.dtype, device=q_BD.device)
    index_B = torch.zeros_like(query_id_B)
    whole_B = best_B
    for start in range(0, len(k_GD) if floor else 0, chunk):
        logits = scale * (q_BD @ k_GD[start : start + chunk].t())
        whole_B = torch.logaddexp(whole_B, logits.logsumexp(1))
    for start in range(0, len(k_GD), chunk):
        columns = slice(start, start + chunk)
        logits = scale * (q_BD @ k_GD[columns].t())
        if floor:
            logits = ((logits - whole_B[:, None]).exp() + floor).log()
        logits = logits + gumbel_noise(seed, query_id_B, candidate_id_G[columns]).to(logits.dtype)
        logits = logits.masked_fill(query_image_B[:, None] == candidate_image_G[None, columns], float("-inf"))
        value, index = logits.max(1)
        better = value > best_B
        best_B = torch.where(better, value, best_B)
        index_B = torch.where(better, index + start, index_B)
    return index_B
