"""The visual tokenizer of BEiT v2 (VQ-KD, arXiv:2208.06366), with its official parameter names.

Dimensions: B images, P patches of one in g rows of g, D width, K codes of width C, T width of the teacher's features, N vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import unit, wide
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.blocks.vit import EPS, Block, drop_path_rates
from vlmo_ds.families.vqkd.config import VQKDSettings
from vlmo_ds.objectives.quantize import commitment, members, moved, nearest, straight_through


class Projection(nn.Module):
    """Pixels, or codes, of each patch to the width of a stack."""

    def __init__(self, channels: int, size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=size, stride=size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class Stack(nn.Module):
    """A ViT with absolute positions. Its last norm, of the patches alone, has the name that BEiT's has where patches are averaged."""

    def __init__(
        self, channels: int, size: int, patches: int, dim: int, depth: int, heads: int, rate: float, recomputed: Recomputed
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.patch_embed = Projection(channels, size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, r, key_bias=False) for r in drop_path_rates(rate, depth))
        self.fc_norm = LayerNorm(dim, eps=EPS)
        self.recomputed = recomputed

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        x_BPD = self.patch_embed(x_BCHW)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BPD), -1, -1), x_BPD), dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            x_BLD = self.recomputed(block, i, x_BLD)
        return self.fc_norm(x_BLD[:, 1:])


class Embedding(nn.Module):
    """The codes, and what the reference keeps beside them of its start by k-means."""

    weight: Tensor  # [K, C]
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        start = F.normalize(torch.randn(codes, width), dim=1)
        self.register_buffer("weight", start)
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", start.clone())
        self.register_buffer("initted", torch.zeros(1))


class Quantized(NamedTuple):
    """vector, code: [B, C, g, g], of unit length and float32 at least; token [B, P] int64."""

    vector: Tensor
    code: Tensor
    token: Tensor


class Quantizer(nn.Module):
    """A codebook of unit vectors that follows the vectors nearest to each. Nothing of it has a gradient."""

    cluster_size: Tensor  # [K], a moving average of how many vectors of a step have each code

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.embedding = Embedding(codes, width)
        self.register_buffer("cluster_size", torch.zeros(codes))

    def forward(self, z_BCgg: Tensor) -> Quantized:
        """Vectors [B, C, g, g] and their nearest codes."""
        vector = F.normalize(wide(z_BCgg), dim=1)
        rows_NC = vector.detach().flatten(2).transpose(1, 2).flatten(0, 1)
        codebook = self.embedding.weight.to(rows_NC.dtype)
        token_N = nearest(rows_NC, codebook)
        code = codebook[token_N].view(len(vector), -1, codebook.shape[1]).transpose(1, 2).reshape(vector.shape)
        return Quantized(vector, code, token_N.view(len(vector), -1))

    def members(self, found: Quantized) -> tuple[Tensor, Tensor]:
        """(counts [K], sums [K, C]) of these vectors by code."""
        rows_NC = found.vector.detach().flatten(2).transpose(1, 2).flatten(0, 1)
        return members(rows_NC, found.token.flatten(), len(self.embedding.weight))

    @torch.no_grad()
    def follow(self, counts_K: Tensor, sums_KC: Tensor, decay: float) -> None:
        """Moves the codebook by the members of all of a step's vectors."""
        self.embedding.weight.copy_(moved(self.embedding.weight, counts_K, sums_KC, decay))
        self.cluster_size.mul_(decay).add_(counts_K, alpha=1 - decay)


def head(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))


class VQKD(nn.Module):
    """Encoder, codebook, decoder."""

    def __init__(self, config: VQKDSettings, recomputed: Recomputed | None = None):
        super().__init__()
        self.config = config
        recomputed = recomputed or Recomputed(config.recompute != "none", config.recompute_every)
        dim, heads, patches = config.embed_dim, config.num_heads, config.patches
        rate = config.drop_path_rate
        self.encoder = Stack(3, config.patch_size, patches, dim, config.depth, heads, rate, recomputed)
        self.decoder = Stack(config.code_dim, 1, patches, dim, config.decoder_depth, heads, 0.0, recomputed)
        self.quantize = Quantizer(config.num_codes, config.code_dim)
        self.encode_task_layer = head(dim, config.code_dim)
        self.decode_task_layer = head(dim, config.teacher_dim)

    def encode(self, image_BCHW: Tensor) -> Quantized:
        """Images from -1 to 1 -> their patches' vectors and codes."""
        z_BPC = self.encode_task_layer(self.encoder(image_BCHW))
        side = self.config.image_size // self.config.patch_size
        return self.quantize(z_BPC.transpose(1, 2).unflatten(2, (side, side)))

    def decode(self, code_BCgg: Tensor) -> Tensor:
        """Codes -> the teacher's features as they are told from them, [B, P, T]."""
        return self.decode_task_layer(self.decoder(code_BCgg.to(self.decoder.pos_embed.dtype)))

    def losses(self, found: Quantized, teacher_BPT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the commitment's sum over the elements, 1 - cosine with the teacher's features summed over the patches, reconstruction [B, P, T])."""
        told_BPT = self.decode(straight_through(found.vector, found.code))
        cosine = (unit(told_BPT) * unit(teacher_BPT)).sum(-1)
        return commitment(found.vector, found.code).sum(), (1 - cosine).sum(), told_BPT
