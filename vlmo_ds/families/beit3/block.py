"""A block of which everything is a modality expert but attention itself: A for images, B for texts (torchscale's names).

Dimensions: B sequences, I image tokens and L text tokens of one, D width, H heads, N packed tokens of a walk, those of images first, M those of
them that go on behind the attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attend
from vlmo_ds.blocks.branch import PackedBlock
from vlmo_ds.blocks.cache import Cache
from vlmo_ds.blocks.fold import Run, heads, in_sequence, joined, sent
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.recompute import gelu_norm_again, norm_again

EPS = 1e-5
Expert = Literal["A", "B"]
EXPERTS: tuple[Expert, Expert] = ("A", "B")


class Multiway(nn.ModuleDict):
    """The same layer twice: A of images, B of texts."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__({"A": image, "B": text})


def linear(dim: int, out: int) -> Multiway:
    return Multiway(nn.Linear(dim, out), nn.Linear(dim, out))


def norm(dim: int) -> Multiway:
    return Multiway(LayerNorm(dim, eps=EPS), LayerNorm(dim, eps=EPS))


class Group(NamedTuple):
    """The sequences of one stream, whose tokens are one or two runs of the packed rows."""

    tokens: dict[Expert, Run]
    queries: dict[Expert, Run]  # those that go on, in the rows that go on
    mask: Tensor | None  # bool [B or 1, 1, 1 or queries, tokens], where they look; None: everywhere

    @property
    def batch(self) -> int:
        return next(iter(self.tokens.values())).batch


@dataclass
class Layout:
    """Where sequences stand in the packed rows. experts: that rows are of, experts_on: of those that go on; on_M: which rows go on behind
    the attention, None: all; kept: gets keys and values of every layer, of the first group."""

    groups: list[Group]
    experts: Sequence[Expert]
    experts_on: Sequence[Expert]
    sequence_M: Tensor
    num_sequences: int
    on_M: Tensor | None = None
    kept: list[tuple[Tensor, Tensor]] | None = None

    def runs(self, expert: Expert, queries: bool = False) -> list[tuple[int, Run]]:
        """(number of the group, run) of what an expert computes, in row order."""
        of = [group.queries if queries else group.tokens for group in self.groups]
        return [(number, runs[expert]) for number, runs in enumerate(of) if expert in runs]

    def split(self, x: Tensor, queries: bool = False) -> Iterator[tuple[Expert, Tensor]]:
        """The rows of each expert, of those that come in or (queries) of those that go on. Where stochastic depth has left an expert none it
        computes none: on every rank the same modules run."""
        experts = self.experts_on if queries else self.experts
        sizes = [sum(run.size for _, run in self.runs(expert, queries)) for expert in experts]
        return zip(experts, x.split(sizes), strict=True)

    def on(self) -> dict[Expert, Tensor]:
        """Which of an expert's rows go on; none: all."""
        if self.on_M is None:
            return {}
        first = sum(run.size for _, run in self.runs("A"))
        return {expert: rows - first * (expert == "B") for expert, rows in self.split(self.on_M, queries=True)}

    def subset(self, keep_S: Tensor) -> tuple[Layout, Tensor]:
        """As blocks.branch.Packed."""
        device = self.sequence_M.device
        which = [part.nonzero()[:, 0] for part in keep_S.split([group.batch for group in self.groups])]
        starts, tokens = 0, [dict[Expert, Run]() for _ in self.groups]
        for expert in EXPERTS:
            for number, run in self.runs(expert):
                if len(which[number]):
                    tokens[number][expert] = run.subset(which[number], starts)
                    starts += tokens[number][expert].size
        groups = []
        for group, runs, one in zip(self.groups, tokens, which, strict=True):
            if runs:
                mask = group.mask if group.mask is None or len(group.mask) == 1 else group.mask[sent(one, device)]
                groups.append(Group(runs, runs, mask))
        rows_K = sent(keep_S, device)[self.sequence_M].nonzero()[:, 0]
        return replace(self, groups=groups, sequence_M=self.sequence_M[rows_K]), rows_K


class Attention(nn.Module):
    """Multi-head attention over all tokens of a sequence, with projections by experts and a norm before the last (arXiv:2210.06423)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (linear(dim, dim) for _ in range(4))
        self.inner_attn_ln = norm(dim)

    def project(self, expert: Expert, x_ND: Tensor, on: Tensor | None, goes_on: bool) -> list[Tensor]:
        """Keys and values [N, D] of an expert's rows, and queries of those that go on where there are any; on: which, None: all."""
        found = [self.k_proj[expert](x_ND), self.v_proj[expert](x_ND)]
        return [*found, self.q_proj[expert](x_ND if on is None else x_ND[on])] if goes_on else found

    def mixed(self, projected: dict[Expert, list[Tensor]], layout: Layout) -> dict[Expert, Tensor]:
        """What `project` gives of each expert -> of each the rows [M, D] that go on, behind the attention."""
        parts: tuple[list[list[Tensor]], ...] = tuple([[] for _ in layout.groups] for _ in range(3))
        for expert, found in projected.items():
            for part, rows, queries in zip(parts, found, (False, False, True), strict=False):
                runs = layout.runs(expert, queries)
                for (number, run), of in zip(runs, rows.split([run.size for _, run in runs]), strict=True):
                    part[number].append(run.sequences(of))
        out: dict[Expert, list[Tensor]] = {}
        for expert, found in projected.items():
            if not layout.runs(expert):
                out[expert] = [torch.stack(found).sum(0)]  # no rows, with a gradient to all
        for number, group in enumerate(layout.groups):
            k, v, q = (heads(in_sequence(part[number]), self.num_heads) for part in parts)
            if layout.kept is not None and not number:
                layout.kept.append((k, v))
            attended = joined(attend(q, k, v, group.mask))
            lengths = [run.length for run in group.queries.values()]
            for (expert, run), piece in zip(group.queries.items(), attended.split(lengths, dim=1), strict=True):
                out.setdefault(expert, []).append(run.packed(piece))
        return {expert: torch.cat(out[expert]) for expert in EXPERTS if expert in out}


class FeedForwardNetwork(nn.Module):
    """Two linear layers with GELU and a norm between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.ffn_layernorm = LayerNorm(hidden, eps=EPS)

    def forward(self, x_ND: Tensor, cheap: bool) -> Tensor:
        """cheap: what GELU and the norm give is computed again in the backward pass."""
        with gelu_norm_again(self.ffn_layernorm, self.fc1(x_ND), cheap) as normed:
            return self.fc2(normed)


class Block(PackedBlock):
    """Pre-norm block with norms inside of its branches (Magneto, arXiv:2210.06423), all but attention by experts (BEiT-3, arXiv:2208.10442,
    section 2.1)."""

    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.self_attn = Attention(dim, num_heads)
        self.self_attn_layer_norm = norm(dim)
        self.ffn = Multiway(FeedForwardNetwork(dim, hidden), FeedForwardNetwork(dim, hidden))
        self.final_layer_norm = norm(dim)

    def forward(self, x_ND: Tensor, layout: Layout) -> Tensor:
        """[N, D] -> [M, D]."""
        x_MD = self.added(x_ND if layout.on_M is None else x_ND[layout.on_M], self.attended, x_ND, layout)
        return self.added(x_MD, self.by_experts, x_MD, layout)

    def attended(self, x_ND: Tensor, layout: Layout) -> Tensor:
        """The branch of the attention, [N, D] -> [M, D]."""
        on, projected = layout.on(), {}
        for expert, rows in layout.split(x_ND):
            goes_on = expert in layout.experts_on
            with norm_again(self.norm_of("self_attn_layer_norm", expert), rows, self.cheap) as normed:
                projected[expert] = self.self_attn.project(expert, normed, on.get(expert), goes_on)
        out = []
        for expert, rows in self.self_attn.mixed(projected, layout).items():
            with norm_again(self.norm_of("self_attn.inner_attn_ln", expert), rows, self.cheap) as normed:
                out.append(self.self_attn.out_proj[expert](normed))
        return torch.cat(out)

    def by_experts(self, x_MD: Tensor, layout: Layout) -> Tensor:
        """The branch of the feed-forward networks, [M, D] -> [M, D]."""
        return torch.cat([self.expanded(expert, rows) for expert, rows in layout.split(x_MD, queries=True)])

    def expanded(self, expert: Expert, x: Tensor) -> Tensor:
        cheap = self.cheap and not self.compiled
        return self.fed(self.norm_of("final_layer_norm", expert), self.ffn[expert], x, cheap)

    def norm_of(self, name: str, expert: Expert) -> Any:
        return self.get_submodule(f"{name}.{expert}")

    def written(self, x_RLD: Tensor, image: tuple[Tensor, Tensor], cache: Cache, layer: int) -> Tensor:
        """The newest words of R texts and a mask word behind them [R, L, D] -> the same, by B. image: keys and values [I, H, S, D/H] of the
        layer, of I images, n texts to each in turn; the cache has those of the words so far, and gets those of the newest, not the
        mask word's."""
        attn = self.self_attn
        projected = attn.project("B", self.self_attn_layer_norm["B"](x_RLD), None, True)
        k, v, q = (heads(part, attn.num_heads) for part in projected)
        every = cache.update(k[:, :, :-1], v[:, :, :-1], layer)
        k, v = (torch.cat((old, new[:, :, -1:]), dim=2) for old, new in zip(every, (k, v), strict=True))
        out = joined(attend_to_image_and_words(q, k, v, *image))
        x_RLD = x_RLD + attn.out_proj["B"](attn.inner_attn_ln["B"](out))
        return x_RLD + self.ffn["B"](self.final_layer_norm["B"](x_RLD), False)


def attend_to_image_and_words(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
    """Queries [R, H, L, C] of the last L of W words, whose keys and values [R, H, W, C] are given, and those [I, H, S, C] of I images, n texts
    to each in turn -> [R, H, L, C]. A word sees its image, itself and the words before it."""
    length, words, images = q.shape[2], k.shape[2], len(image_k)
    q = q * q.shape[-1] ** -0.5
    of_images = q.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)  # [I, H, n * L, C]
    to_image = (of_images @ image_k.transpose(-2, -1)).unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
    place_W = torch.arange(words, device=q.device)
    later_LW = place_W > place_W[words - length :, None]
    to_words = (q @ k.transpose(-2, -1)).masked_fill(later_LW, float("-inf"))
    scores = torch.cat((to_image, to_words), dim=-1)
    chances = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    to_image, to_words = chances.split((to_image.shape[-1], words), dim=-1)
    to_image = to_image.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)
    seen = (to_image @ image_v).unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
    return seen + to_words @ v
