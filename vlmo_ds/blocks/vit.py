"""Blocks of a vision transformer (ViT, arXiv:2010.11929) with timm's and BEiT's parameter names.

Dimensions: B images, L tokens of one (the class token first), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attend, attention_kernel
from vlmo_ds.blocks.branch import FeedForward
from vlmo_ds.blocks.fold import joined, sent
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import AddRows, Mlp, ScaledLinear, kept
from vlmo_ds.blocks.recompute import norm_again

EPS = 1e-6


class Attention(nn.Module):
    """Self-attention. key_bias: keys have a bias too (timm: one of q, k and v together); without it q_bias and v_bias (BEiT, arXiv:2106.08254)."""

    cheap = True  # with a bias, probabilities are computed again in the backward pass

    def __init__(self, dim: int, num_heads: int, key_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = ScaledLinear(dim, dim)

    def forward(self, x_BLD: Tensor, gamma: Tensor | None = None, bias_HLL: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x_BLD)
        if self.qkv.bias is None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (
            attend(q, k, v)
            if bias_HLL is None
            else attention_kernel("auto", x_BLD, self.cheap)(q, k, v, bias_HLL, None)
        )
        return self.proj(joined(out), gamma)


class Block(FeedForward):
    """Pre-norm residual block with stochastic depth. layer_scale: initial value of LayerScale's gammas (CaiT, arXiv:2103.17239), None: none."""

    def __init__(
        self, dim: int, num_heads: int, drop_path_rate: float, key_bias: bool = True, layer_scale: float | None = None
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path_rate = drop_path_rate
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor | None = None) -> Tensor:
        """bias_HLL: added to the attention's scores."""
        x_BLD = self.added(x_BLD, partial(self.attended, bias_HLL=bias_HLL))
        return self.added(x_BLD, self.expanded)

    def attended(self, x_BLD: Tensor, bias_HLL: Tensor | None) -> Tensor:
        with norm_again(self.norm1, x_BLD, self.cheap) as normed:
            return self.attn(normed, self.gamma_1, bias_HLL)

    def expanded(self, x_BLD: Tensor) -> Tensor:
        return self.fed(self.norm2, self.mlp, x_BLD, self.gamma_2)

    def added(self, x_BLD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x_BLD and a branch of it, which stochastic depth leaves out for some images. It is not computed for these, but where there are no
        others: its weights have a gradient on every rank."""
        rate = self.drop_path_rate if self.training else 0.0
        if not rate:
            return x_BLD + branch(x_BLD)
        keep_B = kept(len(x_BLD), rate)
        if not keep_B.any():
            return x_BLD + 0 * branch(x_BLD)
        which_K = sent(keep_B.nonzero()[:, 0], x_BLD.device)
        return AddRows.apply(x_BLD, which_K, branch(x_BLD.index_select(0, which_K)), 1 / (1 - rate))


def drop_path_rates(most: float, depth: int) -> list[float]:
    """Stochastic depth of each block: from none to the most."""
    return [most * i / max(depth - 1, 1) for i in range(depth)]
