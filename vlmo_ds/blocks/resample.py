"""Positions for another image size or text length: tables are resampled, cut or continued."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resample_distances(grid: Tensor, before: int, after: int) -> Tensor:
    """[before^2, C] -> [after^2, C]."""
    from scipy.interpolate import RectBivariateSpline  # a second, for those few that change the resolution

    ratio = geometric_ratio(before // 2, after // 2)
    steps = np.cumsum([ratio**i for i in range(before // 2)])
    known = np.concatenate((-steps[::-1], [0.0], steps))
    wanted = np.arange(-(after // 2), after // 2 + 1, dtype=np.float64)
    values = grid.double().cpu().numpy().reshape(before, before, -1)
    resampled = [RectBivariateSpline(known, known, values[:, :, c])(wanted, wanted) for c in range(values.shape[2])]
    return torch.from_numpy(np.stack(resampled, axis=-1)).reshape(after * after, -1).to(grid)


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
