"""Attention of a decoder's newest words: to the words so far, whose keys and values generation keeps, and to their images."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache(Protocol):
    """Keys and values of the tokens so far (generation.decoding.KeyValueCache)."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends a layer's new ones, [R, H, L, D/H]; all of the layer's."""
        ...


def attend_to_words(q: Tensor, k: Tensor, v: Tensor, cache: Cache, layer: int) -> Tensor:
    """Queries, keys and values of the L newest words of R texts, [R, H, L, D/H] -> the same; each sees itself and those before it,
    whose keys and values are in the cache, where these join them."""
    k, v = cache.update(k, v, layer)
    new, every = q.shape[2], k.shape[2]
    place = torch.arange(every, device=q.device)
    mask = None if new == 1 else place[None] <= place[every - new :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_to_images(q: Tensor, keys: Tensor, values: Tensor, valid_IS: Tensor | None = None) -> Tensor:
    """Queries [R, H, L, D/H] of R = n * I texts, n for each of I images in turn, whose keys and values [I, H, S, D/H] are given ->
    [R, H, L, D/H]. valid_IS: bool, which of their tokens there are; None: all."""
    images, length = len(keys), q.shape[2]
    q = q.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)  # [I, H, n * L, D/H]
    mask = None if valid_IS is None else valid_IS[:, None, None]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
