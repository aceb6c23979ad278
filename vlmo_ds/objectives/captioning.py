"""Captioning: the next word of a text, of an image (CoCa, arXiv:2205.01917, equation 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmo_ds.blocks.layers import wide
from vlmo_ds.distributed.rows import gumbel_noise

CHUNK = 1024  # rows whose logits are in memory at a time


class WordLosses(torch.autograd.Function):
    """Cross-entropies summed, with the logits of a chunk of rows at a time, computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        smoothing: float,
        weight_N: Tensor | None,
        table: bool,
    ) -> tuple[Tensor, Tensor]:
        """As word_losses."""
        total, right = wide(hidden_ND.new_zeros(())), labels_N.new_zeros(())
        normalisers = []
        for start in range(0, max(len(hidden_ND), 1), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden, labels = hidden_ND[rows], labels_N[rows]
            logits = logits_of(hidden, head, bias_V, table)
            normalisers.append(logits.logsumexp(1))
            wanted = (1 - smoothing) * logits.gather(1, labels[:, None])[:, 0]
            if smoothing:
                wanted = wanted + smoothing * logits.mean(1)
            losses = normalisers[-1] - wanted
            total = total + (losses if weight_N is None else losses * weight_N[rows]).sum()
            right = right + (logits.argmax(1) == labels).sum()
        ctx.save_for_backward(hidden_ND, head, labels_N, bias_V, torch.cat(normalisers), weight_N)
        ctx.smoothing, ctx.table = smoothing, table
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head, labels_N, bias_V, normaliser_N, weight_N = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # of several chunks the sum is in float32: 16 bits would round at each
        summed = head.dtype if len(hidden_ND) <= CHUNK else torch.promote_types(head.dtype, torch.float32)
        of_head = torch.zeros_like(head, dtype=summed) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias_V, dtype=normaliser_N.dtype) if ctx.needs_input_grad[3] else None
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            chance = logits_of(hidden_ND[rows], head, bias_V, ctx.table).sub_(normaliser_N[rows, None]).exp_()
            if ctx.smoothing:
                chance -= ctx.smoothing / chance.shape[1]
            chance[torch.arange(len(chance), device=chance.device), labels_N[rows]] -= 1 - ctx.smoothing
            chance.mul_(grad if weight_N is None else grad * weight_N[rows, None].to(chance.dtype))
            if of_bias is not None:
                of_bias += chance.sum(0)
            of_logits = chance.to(hidden_ND.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, head if ctx.table else head.t(), out=of_hidden[rows])
            if of_head is None:
                continue
            left, right = (of_logits.t(), hidden_ND[rows]) if ctx.table else (hidden_ND[rows].t(), of_logits)
            if of_head.dtype == of_logits.dtype:
                of_head.addmm_(left, right)  # no second tensor of the head's size
            else:
                of_head += left @ right
        return (
            of_hidden,
            None if of_head is None else of_head.to(head.dtype),
            None,
            None if of_bias is None else of_bias.to(bias_V.dtype),
            None,
            None,
            None,
        )


def logits_of(hidden_ND: Tensor, head: Tensor, bias_V: Tensor | None, table: bool) -> Tensor:
    """[N, V] in float32 at least."""
    logits = wide(hidden_ND @ (head.t() if table else head))
    return logits if bias_V is None else logits.add_(bias_V)


def word_losses(
    hidden_ND: Tensor,
    head: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
    weight_N: Tensor | None = None,
    table: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sum of the next words' cross-entropies, how many of them are the most likely word).

    hidden_ND: the decoder's output at the words that have a next one; head, bias_V: vocabulary head, [D, V], or [V, D] where it is a
    word table (a transposed view of that would have its gradient added out of place); labels_N: that word's id;
    smoothing: share of the target that is spread evenly over the vocabulary (arXiv:1512.00567, section 7); weight_N: what a word
    counts in the sum, None: 1.
    """
    return WordLosses.apply(hidden_ND, head, labels_N, bias_V, smoothing, weight_N, table)


def before_last(lengths_B: Tensor, length: int) -> Tensor:
    """bool [B, length - 1]: which places of texts have a word after them. length: words of the longest."""
    return torch.arange(length - 1, device=lengths_B.device)[None] < (lengths_B - 1)[:, None]


def learned_words(lengths_B: Tensor, length: int, prompt_B: Tensor | None) -> Tensor | None:
    """bool [N], for each word of texts that has one after it: whether that one's loss is taken; None: always. prompt_B: words of the
    prompt that a text begins with, its start included, which are given and not learned; None: of no text."""
    if prompt_B is None:
        return None
    place = torch.arange(length - 1, device=lengths_B.device)[None]
    return (place >= prompt_B[:, None] - 1)[before_last(lengths_B, length)]


def chosen(learned_N: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Of each the rows whose loss is taken."""
    return rows if learned_N is None else tuple(of[learned_N] for of in rows)


def hidden_words(
    lengths_B: Tensor, length: int, share: float, seed: int, sample_id_B: Tensor, prompt_B: Tensor | None
) -> Tensor:
    """bool [B, length]: the words of texts that are hidden, to be predicted (masked captioning, BEiT-3, arXiv:2208.10442, section 3.1): a
    share of a text, one at least, the end included and its first word not; of a text that begins with a prompt, of what is
    behind it. Which ones is a function of (seed, sample)."""
    place_L = torch.arange(length, device=lengths_B.device)
    first_B = torch.ones_like(lengths_B) if prompt_B is None else prompt_B
    free_BL = (place_L >= first_B[:, None]) & (place_L < lengths_B[:, None])
    count_B = (lengths_B * share + 0.5).long().clamp(min=1).minimum(lengths_B - first_B)
    noise_BL = gumbel_noise(seed, sample_id_B, place_L).masked_fill(~free_BL, float("-inf"))
    rank_BL = noise_BL.argsort(1, descending=True).argsort(1)
    return rank_BL < count_B[:, None]
