"""Weights of a model with another image size or text length: positions are resampled, cut or continued."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.config import ModelConfig, RecipeError
from vlmo_ds.models.position import num_distances

TABLE = "relative_position_bias_table"
IMAGE_POSITIONS = "transformer.pos_embed"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
TEXT_POSITION_IDS = "text_embeddings.position_ids"
TOKEN_TYPES = "token_type_embeddings.weight"


def fit(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: ModelConfig, source_text_len: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """(source with positions of the model's shapes, what was changed).

    own: the model's state dict, whose values stay where the source has none; source_text_len: the source's
    max_text_len_of_initckpt, null: the model's. Raises RecipeError where the source's sizes cannot be told.
    """
    fitted, changed = dict(source), []

    def change(name: str, value: Tensor, how: str) -> None:
        fitted[name] = value
        changed.append(f"{name} {list(source[name].shape)} -> {list(value.shape)}: {how}")

    def differs(name: str) -> bool:
        return name in source and name in own and source[name].shape != own[name].shape

    if differs(TABLE) and source[TABLE].shape[1] == own[TABLE].shape[1]:
        text_len = source_text_len or config.max_text_len_of_initckpt
        before, after = window_of(source[TABLE], text_len), config.image_size // config.patch_size
        value = resize_relative(source[TABLE], before, after, text_len, own[TABLE], config.max_text_len_of_initckpt)
        change(TABLE, value, f"{before} x {before} to {after} x {after} patches")
    if differs(IMAGE_POSITIONS) and source[IMAGE_POSITIONS].shape[2] == own[IMAGE_POSITIONS].shape[2]:
        change(IMAGE_POSITIONS, resize_absolute(source[IMAGE_POSITIONS], own[IMAGE_POSITIONS].shape[1]), "bicubic")
    if differs(TEXT_POSITIONS) and source[TEXT_POSITIONS].shape[1] == own[TEXT_POSITIONS].shape[1]:
        how = "cut" if len(source[TEXT_POSITIONS]) > len(own[TEXT_POSITIONS]) else "the further ones start fresh"
        change(TEXT_POSITIONS, first_rows(source[TEXT_POSITIONS], own[TEXT_POSITIONS]), how)
    if TEXT_POSITION_IDS in own:  # 0, 1, 2, ...: no weights
        fitted[TEXT_POSITION_IDS] = own[TEXT_POSITION_IDS]
    if differs(TOKEN_TYPES) and {len(source[TOKEN_TYPES]), len(own[TOKEN_TYPES])} == {2, 3}:
        both = source[TOKEN_TYPES][[0, 1, 1][: len(own[TOKEN_TYPES])]]
        change(TOKEN_TYPES, both, "a second image begins as the first" if len(both) == 3 else "cut")
    return fitted, changed


def window_of(table: Tensor, text_len: int) -> int:
    """Patches per side that a relative position table was made for."""
    grid = len(table) - num_distances(1, text_len) + 1
    side = math.isqrt(grid) if grid > 0 else 0
    if side * side != grid or side % 2 == 0:
        raise RecipeError(
            f"the relative position table has {len(table)} rows, which fits no image size with texts of "
            f"max_text_len_of_initckpt {text_len}: set init.max_text_len_of_initckpt to the checkpoint's"
        )
    return (side + 1) // 2


def resize_relative(table: Tensor, before: int, after: int, text_len: int, own: Tensor, own_text_len: int) -> Tensor:
    """[distances, layers x heads] for `before` x `before` patches -> for `after` x `after`; the same dtype.

    Distances between patches are resampled as in BEiT's fine-tuning (arXiv:2106.08254): the known ones are thought to lie
    at geometrically growing distances, the new ones at equal distances, with a cubic spline between. Class and text
    entries stay; distances between words that are beyond the source's begin as in `own`.
    """
    patches = (2 * before - 1) ** 2
    grid, rest, words = table[:patches], table[patches : -2 * text_len], table[-2 * text_len :]
    if before != after:
        grid = resample_distances(grid, 2 * before - 1, 2 * after - 1)
    if text_len != own_text_len:
        reach = min(text_len, own_text_len) - 2  # the farthest distance that both know, either way
        known = words
        words = own[-2 * own_text_len :].to(table.dtype, copy=True)
        words[own_text_len - 2 - reach : own_text_len - 1 + reach] = known[text_len - 2 - reach : text_len - 1 + reach]
        words[-3:] = known[-3:]
    return torch.cat((grid, rest, words))


def resample_distances(grid: Tensor, before: int, after: int) -> Tensor:
    """[before^2, C] -> [after^2, C]."""
    from scipy.interpolate import RectBivariateSpline  # a second, for those few that change the resolution

    ratio = geometric_ratio(before // 2, after // 2)
    steps = np.cumsum([ratio**i for i in range(before // 2)])
    known = np.concatenate((-steps[::-1], [0.0], steps))
    wanted = np.arange(-(after // 2), after // 2 + 1, dtype=np.float64)
    values = grid.double().numpy().reshape(before, before, -1)
    resampled = [RectBivariateSpline(known, known, values[:, :, c])(wanted, wanted) for c in range(values.shape[2])]
    return torch.from_numpy(np.stack(resampled, axis=-1)).reshape(after * after, -1).to(grid.dtype)


def geometric_ratio(terms: int, total: float) -> float:
    """The ratio, from 1.01 to 1.5, with which so many terms from 1 on sum up to `total`, to 1e-6 (as BEiT)."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > total:
            high = ratio
        else:
            low = ratio
    return ratio


def resize_absolute(positions: Tensor, rows: int) -> Tensor:
    """[1, 1 + P, D] -> [1, rows, D]: the class token's stays, the patches' are resampled (bicubic)."""
    before, after = math.isqrt(positions.shape[1] - 1), math.isqrt(rows - 1)
    grid = positions[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    dtype = torch.promote_types(grid.dtype, torch.float32)
    grid = F.interpolate(grid.to(dtype), size=(after, after), mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat((positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def first_rows(source: Tensor, own: Tensor) -> Tensor:
    value = own.to(source.dtype, copy=True)
    count = min(len(source), len(own))
    value[:count] = source[:count]
    return value
