"""Scaled dot-product attention with an additive position bias and a mask of padded keys, in several ways.

Dimensions: B sequences, L queries or tokens of one sequence, S its keys, T the first of them (S where not said), H heads, K width of a
head. A mask may be for the first keys alone: those behind are there for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 << 20  # of scores that are there at a time: what a processor's cache holds


def additive_mask(bias_HLS: Tensor | None, key_mask_BT: Tensor | None, keys: int, dtype: torch.dtype) -> Tensor | None:
    """Position bias and padding as one mask that is added to the scaled scores: broadcastable to [B, H, L, S]. keys: S."""
    mask = None if bias_HLS is None else bias_HLS[None].to(dtype)
    if key_mask_BT is None:
        return mask
    padding = torch.zeros(len(key_mask_BT), keys, dtype=dtype, device=key_mask_BT.device)
    padding[:, : key_mask_BT.shape[1]].masked_fill_(key_mask_BT == 0, float("-inf"))
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias_HLS: Tensor | None, key_mask_BT: Tensor | None) -> Tensor:
    """Attention by torch's scaled_dot_product_attention. q: [B, H, L, K]; k, v: [B, H, S, K] -> [B, H, L, K]."""
    mask = additive_mask(bias_HLS, key_mask_BT, k.shape[2], q.dtype)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def probabilities(q: Tensor, k: Tensor, bias_HLS: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, H, L, S], scores and softmax in float32 at least. q is scaled; mask: bool, which keys there are, broadcastable to
    [B, H, L, T]."""
    scores = torch.matmul(q, k.transpose(-2, -1))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if bias_HLS is not None:
        scores.add_(bias_HLS)
    if mask is not None:
        scores[..., : mask.shape[-1]].masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1)


def of_scores(key_mask_BT: Tensor | None) -> Tensor | None:
    """The mask of keys as one of scores, [B, 1, 1, T] bool."""
    return None if key_mask_BT is None else (key_mask_BT != 0)[:, None, None]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias_HLS: Tensor | None, key_mask_BT: Tensor | None) -> Tensor:
    """The same written out: what the tests compare against."""
    return torch.matmul(probabilities(q * q.shape[-1] ** -0.5, k, bias_HLS, of_scores(key_mask_BT)).to(v.dtype), v)


class Recomputing(torch.autograd.Function):
    """explicit_attention, which keeps queries, keys and values, and computes probabilities again in the backward pass; a few sequences
    at a time, so that scores stay in the processor's cache. The gradient of the bias is summed over sequences as it comes.
    mask: as of probabilities."""

    @staticmethod
    def forward(  # type: ignore[override]  # a function's forward is its own
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias_HLS: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5
        q, k, v = torch.mul(q, scale, out=q.new_empty(q.shape)), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, bias_HLS, mask)
        ctx.scale = scale
        out = torch.empty_like(q)
        for part in chunks(q, k):
            chances = probabilities(q[part], k[part], bias_HLS, rows_of(mask, part))
            product(chances.to(v.dtype), v[part], out[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias_HLS, mask = ctx.saved_tensors  # q is scaled
        grad = grad.contiguous()
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        of_bias = None
        for part in chunks(q, k):
            chances = probabilities(q[part], k[part], bias_HLS, rows_of(mask, part))
            product(chances.to(v.dtype).transpose(-2, -1), grad[part], of_v[part])
            of_chances = torch.matmul(grad[part], v[part].transpose(-2, -1)).to(chances.dtype)
            of_scores = torch.ops.aten._softmax_backward_data(of_chances, chances, -1, chances.dtype)
            if ctx.needs_input_grad[3]:
                of_bias = of_scores.sum(0) if of_bias is None else of_bias.add_(of_scores.sum(0))
            of_scores = of_scores.to(q.dtype)
            product(of_scores, k[part], of_q[part]).mul_(ctx.scale)
            product(of_scores.transpose(-2, -1), q[part], of_k[part])
        return of_q, of_k, of_v, None if of_bias is None else of_bias.to(bias_HLS.dtype), None


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Of matrices [B, H, ...], written in place."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Sequences that are computed together."""
    batch, heads, length, _ = q.shape
    size = max(1, CHUNK_BYTES // (4 * heads * length * k.shape[2]))
    return [slice(first, first + size) for first in range(0, batch, size)]


def rows_of(mask: Tensor | None, part: slice) -> Tensor | None:
    """The mask of some sequences; where it has one for all, that."""
    return mask if mask is None or len(mask) == 1 else mask[part]


def recomputing_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_HLS: Tensor | None, key_mask_BT: Tensor | None
) -> Tensor:
    """As explicit_attention, with less memory."""
    return Recomputing.apply(q, k, v, bias_HLS, of_scores(key_mask_BT))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention without a bias. q: [B, H, L, K]; k, v: [B, H, S, K] -> [B, H, L, K]. mask: bool, where a query may look, [B or 1, 1, 1 or
    L, S]; dropout: of the probabilities. By torch's kernel, but where that has a slow backward pass: on a CPU in 16 bits it takes
    1.7 to 3.9 times as long as products of matrices (`benchmarks/attention.py`)."""
    if q.device.type == "cpu" and q.element_size() < 4 and not dropout:
        return Recomputing.apply(q, k, v, None, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa_attention,
    "explicit": explicit_attention,
    "recomputing": recomputing_attention,
}


def attention_kernel(name: str, x: Tensor, cheap: bool) -> Callable[..., Tensor]:
    """The one of that name; for "auto" torch's kernel where x is on a GPU, and on a CPU, where that falls back to a slower composition
    as soon as the mask needs a gradient (benchmarks/attention.py), written out. cheap: probabilities are computed again."""
    if name == "auto":
        name = "sdpa" if x.is_cuda else "explicit"
    return ATTENTION["recomputing" if name == "explicit" and cheap else name]
