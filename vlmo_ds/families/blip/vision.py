"""BLIP's image tower: a ViT (arXiv:2010.11929) with timm's parameter names.

Dimensions: B images, L tokens of one (the class token first), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import PatchEmbed
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.blocks.vit import EPS, Block, drop_path_rates
from vlmo_ds.families.blip.config import BLIPSettings


class VisionTransformer(nn.Module):
    def __init__(self, config: BLIPSettings, recomputed: Recomputed):
        super().__init__()
        dim, heads = config.vision_width, config.vision_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, dim))
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, dim)
        rates = drop_path_rates(config.drop_path_rate, config.vision_layers)
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = LayerNorm(dim, eps=EPS)
        self.recomputed = recomputed

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, L, D]."""
        x_BLD = self.patch_embed(image_BCHW)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BLD), -1, -1), x_BLD), dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            x_BLD = self.recomputed(block, i, x_BLD)
        return self.norm(x_BLD)
