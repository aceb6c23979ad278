"""The layers of a MultiWay block: patch embedding, attention, experts, stochastic depth.

Dimensions: B sequences, L tokens of one sequence, D width, H heads, K width of a head, P patches,
N tokens of all sequences of a wave together ("packed"; see multiway.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each (ViT, arXiv:2010.11929, section 3.1)."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int):
        super().__init__()
        self.image_size = image_size
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, image_size, image_size] -> [B, P, D]."""
        if image_BCHW.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(str(n) for n in image_BCHW.shape[-2:])
            raise ValueError(f"image is {found} pixels, the model takes {self.image_size}x{self.image_size}")
        return self.proj(image_BCHW).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """A modality expert: two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class QkvLinear(nn.Linear):
    """The joint query-key-value projection, given its bias from outside.

    The parameter names are the official ones (`attn.qkv.weight`, `attn.q_bias`, `attn.v_bias`). The weight is
    used inside its owner's forward, so that ZeRO-3 gathers it.
    """

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]  # a module's forward is its own
        return F.linear(x, self.weight, bias)


def given(tensor: Tensor | None, what: str) -> Tensor:
    """A tensor that not every call needs; ValueError where one that needs it goes without."""
    if tensor is None:
        raise ValueError(f"{what} is needed here, and is None")
    return tensor


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


@dataclass
class AttentionGroup:
    """Sequences of equal length that stand in the packed tokens as one or two runs (text tokens, image tokens)."""

    parts: Sequence[tuple[int, int, int]]  # (first row, sequences B, tokens of the part), in sequence order
    key_mask_BL: Tensor | None  # 1 where a token may be attended to; None: everywhere
    bias_index_LL: Tensor | None  # rows of the relative position table; None: absolute positions


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values but not on keys (BEiT, arXiv:2106.08254)."""

    def __init__(self, dim: int, num_heads: int, implementation: str = "auto"):
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = QkvLinear(dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_ND: Tensor, groups: Sequence[AttentionGroup], bias_table_RH: Tensor | None) -> Tensor:
        """Packed tokens [N, D] -> [N, D]; each sequence of each group attends to itself only.

        bias_table_RH: this layer's part of the relative position table, one row per distance.
        """
        name = self.implementation
        if name == "auto":
            name = "sdpa" if x_ND.is_cuda else "explicit"
        attend = ATTENTION[name]
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv_N3D = self.qkv(x_ND, bias)
        rows: dict[int, Tensor] = {}
        for group in groups:
            pieces = [qkv_N3D[start : start + b * n].view(b, n, -1) for start, b, n in group.parts]
            qkv = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            batch, length, _ = qkv.shape
            q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            bias_HLL = None
            if bias_table_RH is not None:
                bias_HLL = (
                    F.embedding(given(group.bias_index_LL, "bias_index_LL"), bias_table_RH)
                    .permute(2, 0, 1)
                    .contiguous()
                )
            out = attend(q, k, v, bias_HLL, group.key_mask_BL).transpose(1, 2).reshape(batch, length, -1)
            lengths = [n for _, _, n in group.parts]
            for (start, _, _), piece in zip(group.parts, out.split(lengths, dim=1), strict=True):
                rows[start] = piece.reshape(-1, out.shape[-1])
        return self.proj(torch.cat([rows[start] for start in sorted(rows)]))


def drop_path(x_ND: Tensor, rate: float, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): drops the residual branch of whole sequences, scales the others up.

    sequence_N: the sequence that each packed token belongs to.
    """
    keep = torch.rand(num_sequences, device=x_ND.device) >= rate
    return x_ND * (keep.to(x_ND.dtype) / (1.0 - rate))[sequence_N, None]


@dataclass
class PackedLayout:
    """Where things stand in the packed tokens: the rows of each expert, the sequences, the attention groups."""

    experts: dict[str, slice]  # "text", "imag", "vl" -> rows, in row order and without gaps
    groups: list[AttentionGroup]
    sequence_N: Tensor
    num_sequences: int


class Block(nn.Module):
    """A MultiWay block: shared self-attention, then one feed-forward expert per modality (VLMo, arXiv:2111.02358)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        layer_scale_init: float | None,
        with_vl_expert: bool,
        attention: str,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2_text = nn.LayerNorm(dim, eps=1e-6)
        self.norm2_imag = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_text = Mlp(dim, hidden)
        self.mlp_imag = Mlp(dim, hidden)
        if with_vl_expert:
            self.norm2_vl = nn.LayerNorm(dim, eps=1e-6)
            self.mlp_vl = Mlp(dim, hidden)
        if layer_scale_init is None:
            self.gamma_1 = self.gamma_2 = None
        else:  # LayerScale (CaiT, arXiv:2103.17239)
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale_init))

    def forward(self, x_ND: Tensor, layout: PackedLayout, bias_table_RH: Tensor | None) -> Tensor:
        x_ND = x_ND + self.branch(self.attn(self.norm1(x_ND), layout.groups, bias_table_RH), self.gamma_1, layout)
        outputs = []
        for modality, rows in layout.experts.items():
            norm, mlp = getattr(self, f"norm2_{modality}"), getattr(self, f"mlp_{modality}")
            outputs.append(mlp(norm(x_ND[rows])))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return x_ND + self.branch(mixed, self.gamma_2, layout)

    def branch(self, y_ND: Tensor, gamma: Tensor | None, layout: PackedLayout) -> Tensor:
        if gamma is not None:
            y_ND = gamma * y_ND
        if self.training and self.drop_path_rate > 0.0:
            y_ND = drop_path(y_ND, self.drop_path_rate, layout.sequence_N, layout.num_sequences)
        return y_ND
