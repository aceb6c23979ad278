"""A MultiWay block: attention over packed tokens, then one feed-forward expert per modality.

Dimensions: B sequences, L tokens of one sequence, D width, H heads, N tokens of all sequences of a wave together ("packed";
see multiway.py), M those of them that go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attention_kernel
from vlmo_ds.blocks.branch import PackedBlock
from vlmo_ds.blocks.fold import Run, heads, in_sequence, joined, sent
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import Mlp, ScaledLinear
from vlmo_ds.blocks.recompute import norm_again


class QkvLinear(nn.Linear):
    """The joint query-key-value projection, given its bias from outside.

    The parameter names are the official ones (`attn.qkv.weight`, `attn.q_bias`, `attn.v_bias`). The weight is
    used inside its owner's forward, so that ZeRO-3 gathers it.
    """

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)

    def forward(self, x_ND: Tensor, bias: Tensor, queries_M: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # a module's forward is its own
        """(queries [M, D] of those rows, None: of all; keys and values [N, 2D])."""
        dim = x_ND.shape[1]
        if queries_M is None:
            return F.linear(x_ND, self.weight, bias).split((dim, 2 * dim), dim=1)
        return F.linear(x_ND[queries_M], self.weight[:dim], bias[:dim]), F.linear(x_ND, self.weight[dim:], bias[dim:])


def by_run(runs: Sequence[Run], x_NC: Tensor) -> dict[int, Tensor]:
    """The rows of runs that are together all rows, by their first."""
    runs = sorted(runs)
    return {run.start: rows for run, rows in zip(runs, x_NC.split([run.size for run in runs]), strict=True)}


@dataclass
class AttentionGroup:
    """Sequences that stand in the packed tokens as one or two runs: text tokens, image tokens."""

    tokens: Sequence[Run]
    queries: Sequence[Run]  # those that go on, the first of each sequence, in the rows that go on
    key_mask_BT: Tensor | None  # bool, true where there is a token, of the first run; None: everywhere
    biases_HLL: Sequence[Tensor | None]  # of each layer; None: absolute positions


@dataclass
class PackedLayout:
    """Where things stand in the packed tokens: the sequences, the attention groups; the rows that go on behind the attention, None:
    all, and how these are shared among the experts."""

    experts: Mapping[str, int]  # "text", "imag", "vl" -> how many rows, in row order
    groups: list[AttentionGroup]
    sequence_M: Tensor
    num_sequences: int
    on_M: Tensor | None = None

    @cached_property
    def host_M(self) -> Tensor:
        """sequence_M on the CPU."""
        return self.sequence_M.cpu()

    def subset(self, keep_S: Tensor) -> tuple[PackedLayout, Tensor]:
        """The layout of some sequences alone, bool [S] on the CPU; and which rows theirs are here, [K]. All rows have to go on."""
        device = self.sequence_M.device
        which = [part.nonzero()[:, 0] for part in keep_S.split([group.tokens[0].batch for group in self.groups])]
        whose = {run.start: (run, one) for group, one in zip(self.groups, which, strict=True) for run in group.tokens}
        ends = list(accumulate(self.experts.values()))
        experts, runs, start = dict.fromkeys(self.experts, 0), {}, 0
        for first, (run, one) in sorted(whose.items()):
            runs[first] = run.subset(one, start)
            start += runs[first].size
            experts[next(name for name, end in zip(experts, ends, strict=True) if first < end)] += runs[first].size
        groups = []
        for group, one in zip(self.groups, which, strict=True):
            if len(one):
                tokens = [runs[run.start] for run in group.tokens]
                mask_KT = None if group.key_mask_BT is None else group.key_mask_BT[sent(one, device)]
                groups.append(AttentionGroup(tokens, tokens, mask_KT, group.biases_HLL))
        rows_K = sent(keep_S[self.host_M].nonzero()[:, 0], device)
        return PackedLayout(experts, groups, self.sequence_M[rows_K], self.num_sequences), rows_K


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values but not on keys (BEiT, arXiv:2106.08254)."""

    cheap = True  # probabilities are computed again in the backward pass

    def __init__(self, dim: int, num_heads: int, implementation: str = "auto"):
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = QkvLinear(dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = ScaledLinear(dim, dim)

    def forward(self, x_ND: Tensor, layout: PackedLayout, layer: int, gamma: Tensor | None) -> Tensor:
        """Packed tokens [N, D] -> [M, D] of those that go on, times gamma; each sequence of each group attends to itself only."""
        attend = attention_kernel(self.implementation, x_ND, self.cheap)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q_MD, kv_NC = self.qkv(x_ND, bias, layout.on_M)
        queries = by_run([run for group in layout.groups for run in group.queries], q_MD)
        keys_values = by_run([run for group in layout.groups for run in group.tokens], kv_NC)
        rows: dict[int, Tensor] = {}
        for group in layout.groups:
            q = heads(in_sequence([run.sequences(queries[run.start]) for run in group.queries]), self.num_heads)
            kv_BLC = in_sequence([run.sequences(keys_values[run.start]) for run in group.tokens])
            k, v = (heads(part, self.num_heads) for part in kv_BLC.chunk(2, dim=-1))
            bias_HLL = group.biases_HLL[layer]
            if bias_HLL is not None:
                bias_HLL = bias_HLL[:, : q.shape[2]]
            out = joined(attend(q, k, v, bias_HLL, group.key_mask_BT))
            lengths = [run.length for run in group.queries]
            for run, piece in zip(group.queries, out.split(lengths, dim=1), strict=True):
                rows[run.start] = run.packed(piece)
        return self.proj(torch.cat([rows[start] for start in sorted(rows)]), gamma)


class Block(PackedBlock):
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
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2_text = LayerNorm(dim, eps=1e-6)
        self.norm2_imag = LayerNorm(dim, eps=1e-6)
        self.mlp_text = Mlp(dim, hidden)
        self.mlp_imag = Mlp(dim, hidden)
        if with_vl_expert:
            self.norm2_vl = LayerNorm(dim, eps=1e-6)
            self.mlp_vl = Mlp(dim, hidden)
        if layer_scale_init is None:
            self.gamma_1 = self.gamma_2 = None
        else:  # LayerScale (CaiT, arXiv:2103.17239)
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale_init))

    def forward(self, x_ND: Tensor, layout: PackedLayout, layer: int) -> Tensor:
        """[N, D] -> [M, D]. layer: the number of this block."""
        attended = partial(self.attended, layer=layer)
        x_MD = self.added(x_ND if layout.on_M is None else x_ND[layout.on_M], attended, x_ND, layout)
        return self.added(x_MD, self.by_experts, x_MD, layout)

    def attended(self, x_ND: Tensor, layout: PackedLayout, layer: int) -> Tensor:
        """The branch of the attention, [N, D] -> [M, D]."""
        with norm_again(self.norm1, x_ND, self.cheap) as normed:
            return self.attn(normed, layout, layer, self.gamma_1)

    def by_experts(self, x_MD: Tensor, layout: PackedLayout) -> Tensor:
        """The branch of the experts, [M, D] -> [M, D]."""
        outputs = []
        for modality, rows_D in zip(layout.experts, x_MD.split(list(layout.experts.values())), strict=True):
            norm, mlp = getattr(self, f"norm2_{modality}"), getattr(self, f"mlp_{modality}")
            outputs.append(self.fed(norm, mlp, rows_D, self.gamma_2))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
