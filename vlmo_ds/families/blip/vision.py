"""BLIP's image tower: a ViT (arXiv:2010.11929) with timm's parameter names.

Dimensions: B images, L tokens of one (the class token first), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attend
from vlmo_ds.blocks.branch import FeedForward
from vlmo_ds.blocks.fold import joined, sent
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import AddRows, Mlp, PatchEmbed, kept
from vlmo_ds.blocks.recompute import Recomputed, norm_again
from vlmo_ds.families.blip.config import BLIPSettings

EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(joined(attend(q, k, v)))


class Block(FeedForward):
    """Pre-norm residual block with stochastic depth."""

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path_rate = drop_path_rate

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.added(x_BLD, self.attended)
        return self.added(x_BLD, partial(self.fed, self.norm2, self.mlp))

    def attended(self, x_BLD: Tensor) -> Tensor:
        with norm_again(self.norm1, x_BLD, self.cheap) as normed:
            return self.attn(normed)

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


class VisionTransformer(nn.Module):
    def __init__(self, config: BLIPSettings, recomputed: Recomputed):
        super().__init__()
        dim, depth = config.vision_width, config.vision_layers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, dim))
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, dim)
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, config.vision_heads, rate) for rate in rates)
        self.norm = LayerNorm(dim, eps=EPS)
        self.recomputed = recomputed

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, L, D]."""
        x_BLD = self.patch_embed(image_BCHW)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BLD), -1, -1), x_BLD), dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            x_BLD = self.recomputed(block, i, x_BLD)
        return self.norm(x_BLD)
