"""The layers of CLIP's towers, with open_clip's parameter names: attention, pre-norm blocks, the attentional pooler.

Dimensions: B sequences, L tokens of one sequence, S tokens that are attended to, D width, N tokens of all sequences together
(folded: padding left out).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo_ds.blocks.attention import attend
from vlmo_ds.blocks.branch import FeedForward
from vlmo_ds.blocks.cache import Cache, attend_to_images, attend_to_words
from vlmo_ds.blocks.fold import Fold, heads, joined
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import GeluLinear, given
from vlmo_ds.blocks.recompute import Recomputed, norm_again


class Attention(nn.Module):
    """torch.nn.MultiheadAttention's parameters: of tokens to one another, or to a context of another width."""

    cheap = True  # a context's norm, keys and values are computed again in the backward pass

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        if context_dim in (None, dim):
            self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(dim, dim))
            self.k_proj_weight = nn.Parameter(torch.empty(dim, context_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(dim, context_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    @property
    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self, "in_proj_weight"):
            query, key, value = self.in_proj_weight.chunk(3)
            return query, key, value
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(
        self,
        x: Tensor,
        context_BSD: Tensor | None = None,
        mask: Tensor | None = None,
        fold: Fold | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """x: [B, L, D], [1, L, D] for the same queries in all contexts, or [N, D] with fold; context_BSD: what is attended to
        after its norm, None: x itself; mask: of x itself, bool, true where a query may look, broadcastable to [B, H, L, L].
        Gives what x is, for every context."""
        if context_BSD is None:
            out_BHLC = attend(*self.of_itself(x, fold), mask)
        else:
            look = partial(self.of_context, given(norm, "norm"))
            if self.cheap and torch.is_grad_enabled():  # a context has more tokens than a caption
                look = partial(checkpoint, look, use_reentrant=False, preserve_rng_state=False)
            out_BHLC = look(self.query(x, fold), context_BSD)
        out_BLD = joined(out_BHLC)
        return self.out_proj(out_BLD if fold is None else fold.folded(out_BLD))

    def of_context(self, norm: nn.Module, q: Tensor, context_BSD: Tensor) -> Tensor:
        """What queries [B, H, L, D/H], or [1, ...] for all contexts, find in them -> [B, H, L, D/H]."""
        k, v = self.keys_and_values(norm(context_BSD))
        return attend(q.expand(len(k), -1, -1, -1), k, v)

    def of_itself(self, x: Tensor, fold: Fold | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, [B, H, L, D/H] each."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (qkv if fold is None else fold.padded(qkv)).chunk(3, dim=-1)
        return self.heads(q), self.heads(k), self.heads(v)

    def query(self, x: Tensor, fold: Fold | None = None) -> Tensor:
        """As forward's x -> [B, H, L, D/H]."""
        q = F.linear(x, self.projections[0], self.in_proj_bias[: self.dim])
        return self.heads(q if fold is None else fold.padded(q))

    def keys_and_values(self, context_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, S, D/H] each."""
        _, wk, wv = self.projections
        _, bk, bv = self.in_proj_bias.chunk(3)
        return self.heads(F.linear(context_BSD, wk, bk)), self.heads(F.linear(context_BSD, wv, bv))

    def heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D/H]."""
        return heads(x_BLD, self.num_heads)

    def step(self, x_RLD: Tensor, cache: Cache, layer: int) -> Tensor:
        """The L newest tokens of R texts, whose keys and values join those of the tokens before them in the cache."""
        return self.out_proj(joined(attend_to_words(*self.of_itself(x_RLD), cache, layer)))

    def look(self, x_RLD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of R = n * B texts, n for each of B contexts, to keys and values [B, H, S, D/H] of the contexts
        -> [R, L, D]."""
        return self.out_proj(joined(attend_to_images(self.query(x_RLD), keys, values)))


class Block(FeedForward):
    """Pre-norm residual block (CLIP, arXiv:2103.00020); with `cross` its attention is to a context, which has a norm of its
    own (CoCa's multimodal decoder)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, cross: bool = False):
        super().__init__()
        self.ln_1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        if cross:
            self.ln_1_kv = LayerNorm(dim)
        self.ln_2 = LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(dim, hidden), c_proj=GeluLinear(hidden, dim)))

    def reset_parameters(self, depth: int) -> None:
        """CLIP's scheme for a block of a tower of so many (arXiv:2103.00020, section 2.4)."""
        dim = self.attn.dim
        for weight in self.attn.projections:
            nn.init.normal_(weight, std=dim**-0.5)
        first, second = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        for linear, std in (
            (self.attn.out_proj, (2 * dim * depth) ** -0.5),
            (first, (2 * dim) ** -0.5),
            (second, (2 * dim * depth) ** -0.5),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, context_BSD: Tensor | None = None, mask: Tensor | None = None, fold: Fold | None = None
    ) -> Tensor:
        """As Attention."""
        with norm_again(self.ln_1, x, self.cheap) as normed:
            x = x + self.attn(normed, context_BSD, mask, fold, None if context_BSD is None else self.ln_1_kv)
        return x + self.fed(self.ln_2, self.mlp, x)

    def step(self, x_RLD: Tensor, cache: Cache, layer: int) -> Tensor:
        """As Attention.step."""
        x_RLD = x_RLD + self.attn.step(self.ln_1(x_RLD), cache, layer)
        return x_RLD + self.mlp(self.ln_2(x_RLD))

    def look(self, x_RLD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As Attention.look."""
        x_RLD = x_RLD + self.attn.look(self.ln_1(x_RLD), keys, values)
        return x_RLD + self.mlp(self.ln_2(x_RLD))


def blocks_of(stack: nn.ModuleList) -> list[Block]:
    return cast(list[Block], list(stack))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, dim: int, layers: int, num_heads: int, mlp_ratio: float, recomputed: Recomputed):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(layers))
        self.recomputed = recomputed

    def forward(self, x: Tensor, mask: Tensor | None = None, fold: Fold | None = None) -> Tensor:
        for i, block in enumerate(self.resblocks):
            x = self.recomputed(block, i, x, None, mask, fold)
        return x


class AttentionalPooler(nn.Module):
    """Learnt queries that attend to tokens (CoCa, arXiv:2205.01917, section 3.2)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, queries: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, dim))
        self.attn = Attention(dim, num_heads, context_dim)
        self.ln_q = LayerNorm(dim)
        self.ln_k = LayerNorm(context_dim)

    def reset_parameters(self) -> None:
        for weight in (*self.attn.projections, self.attn.out_proj.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.attn.out_proj.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, context_dim] -> [B, queries, dim]."""
        return self.attn(self.ln_q(self.query)[None], x_BSD, norm=self.ln_k)
