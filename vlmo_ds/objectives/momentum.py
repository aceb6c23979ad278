"""Contrast with a teacher's features as keys and soft targets (MoCo, arXiv:1911.05722; ALBEF, arXiv:2107.07651, section 3.2).

Dimensions: B rows of this rank, C columns: keys of the global batch, then those of a queue; D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]  # [D, c] each, whose columns are together the C keys: a queue is not copied


class Keys(NamedTuple):
    """The teacher's features, of unit length and float32 at least; image_id_C int64; valid_C bool: a queue has empty places."""

    image: Parts
    text: Parts
    image_id_C: Tensor
    valid_C: Tensor


def similarities(query_BD: Tensor, key: Parts, keys: Keys, temperature: Tensor) -> Tensor:
    """[B, C], minus infinity where a key is not valid."""
    products_BC = torch.cat([query_BD @ part_DC for part_DC in key], dim=1)
    return (products_BC / temperature).masked_fill(~keys.valid_C, float("-inf"))


def soft_targets(
    teacher_BD: Tensor, key: Parts, keys: Keys, image_id_B: Tensor, temperature: Tensor, alpha: float
) -> Tensor:
    """[B, C], each row a distribution: alpha of what the teacher finds alike, the rest on the keys of the row's image.

    teacher_BD: the teacher's features of the rows.
    """
    positive_BC = ((image_id_B[:, None] == keys.image_id_C) & keys.valid_C).to(teacher_BD.dtype)
    target_BC = positive_BC / positive_BC.sum(1, keepdim=True)
    if not alpha:
        return target_BC
    return alpha * similarities(teacher_BD, key, keys, temperature).softmax(1) + (1 - alpha) * target_BC


def momentum_contrast(
    query_BD: Tensor,
    teacher_BD: Tensor,
    key: Parts,
    keys: Keys,
    image_id_B: Tensor,
    temperature: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """(sum over rows of the cross-entropies with soft targets, rows whose best key is of their own image)."""
    logits_BC = similarities(query_BD, key, keys, temperature)
    with torch.no_grad():
        target_BC = soft_targets(teacher_BD, key, keys, image_id_B, temperature, alpha)
    chances_BC = logits_BC.log_softmax(1).masked_fill(~keys.valid_C, 0.0)
    right = (keys.image_id_C[logits_BC.argmax(1)] == image_id_B).sum()
    return -(chances_BC * target_BC).sum(), right
