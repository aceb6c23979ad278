"""Scaled dot-product attention with an additive position bias and a mask of padded keys, in two ways.

Dimensions: B sequences, L tokens of one sequence, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def additive_mask(bias_HLL: Tensor | None, key_mask_BL: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Position bias and padding as one mask that is added to the scaled scores: broadcastable to [B, H, L, L]."""
    mask = None if bias_HLL is None else bias_HLL[None].to(dtype)
    if key_mask_BL is None:
        return mask
    padding = torch.zeros(key_mask_BL.shape, dtype=dtype, device=key_mask_BL.device)
    padding = padding.masked_fill(key_mask_BL == 0, float("-inf"))[:, None, None, :]
    return padding if mask is None else mask + padding


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias_HLL: Tensor | None, key_mask_BL: Tensor | None) -> Tensor:
    """Attention by torch's scaled_dot_product_attention. q, k, v: [B, H, L, K] -> [B, H, L, K]."""
    mask = additive_mask(bias_HLL, key_mask_BL, q.dtype)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias_HLL: Tensor | None, key_mask_BL: Tensor | None) -> Tensor:
    """The same written out, with scores and softmax in float32 at least: what the tests compare against.

    It is also what runs on CPUs, where torch's kernel falls back to a slower composition as soon as the mask
    needs a gradient (benchmarks/attention.py).
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    mask = additive_mask(bias_HLL, key_mask_BL, scores.dtype)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


ATTENTION = {"sdpa": sdpa_attention, "explicit": explicit_attention}


def attention_kernel(name: str, x: Tensor) -> Callable[..., Tensor]:
    """The one of that name; for "auto" torch's kernel where x is on a GPU, and written out on a CPU."""
    if name == "auto":
        name = "sdpa" if x.is_cuda else "explicit"
    return ATTENTION[name]
