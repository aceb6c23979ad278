"""A MultiWay block: attention over packed tokens, then one feed-forward expert per modality.

Dimensions: B sequences, L tokens of one sequence, D width, H heads, N tokens of all sequences of a wave together ("packed";
see multiway.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attention_kernel
from vlmo_ds.blocks.layers import Mlp, drop_path, given


class QkvLinear(nn.Linear):
    """The joint query-key-value projection, given its bias from outside.

    The parameter names are the official ones (`attn.qkv.weight`, `attn.q_bias`, `attn.v_bias`). The weight is
    used inside its owner's forward, so that ZeRO-3 gathers it.
    """

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]  # a module's forward is its own
        return F.linear(x, self.weight, bias)


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
        attend = attention_kernel(self.implementation, x_ND)
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
