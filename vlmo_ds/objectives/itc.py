"""Image-text contrast over the global batch."""

from __future__ import annotations

import math

from torch import Tensor

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Contrasted, Draw, contrast

MAX_LOG_SCALE = math.log(100.0)  # CLIP, arXiv:2103.00020, section 2.5


def scale_of(log_scale: Tensor, like: Tensor) -> Tensor:
    """0-d, in the dtype of `like`. At most 100; past it the value stays and the gradient still flows, so that it can come back."""
    log_scale = log_scale.reshape(()).to(like.dtype)
    return (log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()).exp()


def itc_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    collector: Collector,
    draws: tuple[Draw, Draw] | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Contrasted]:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv:2103.00020; VLMo, section 3.2).

    image_BD, text_BD: features of this rank, of unit length, float32 at least; scale: 0-d; draws: as of contrast, whose result comes last.
    """
    found = contrast(image_BD, text_BD, scale, collector, draws)
    count = found.loss.detach().new_tensor(len(image_BD))
    ratios = {"i2t_accuracy": (found.i2t_right, count), "t2i_accuracy": (found.t2i_right, count)}
    return collector.global_mean(found.loss, count), ratios, found
