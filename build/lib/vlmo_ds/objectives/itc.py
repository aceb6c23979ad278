"""Image-text contrast over the global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import contrastive_rows

MAX_LOG_SCALE = math.log(100.0)  # CLIP, arXiv:2103.00020, section 2.5


@dataclass
class Contrast:
    """Features of this rank and of all ranks, unit length, float32 at least; and the scale (already exponentiated)."""

    image_BD: Tensor
    text_BD: Tensor
    all_image_GD: Tensor
    all_text_GD: Tensor
    scale: Tensor


def gather_features(image_BD: Tensor, text_BD: Tensor, log_scale: Tensor, collector: Collector) -> Contrast:
    """The scale is at most 100; past it the value stays and the gradient still flows, so that it can come back."""
    both = collector.gather(torch.stack((image_BD, text_BD), dim=1))  # one collective for both modalities
    log_scale = log_scale.reshape(()).to(image_BD.dtype)
    log_scale = log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()
    return Contrast(image_BD, text_BD, both[:, 0], both[:, 1], log_scale.exp())


def itc_loss(contrast: Contrast, collector: Collector) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv:2103.00020; VLMo, section 3.2)."""
    batch = len(contrast.image_BD)
    label_B = collector.first_row(batch) + torch.arange(batch, device=contrast.image_BD.device)
    i2t, i2t_correct = contrastive_rows(contrast.image_BD, contrast.all_text_GD, contrast.scale, label_B)
    t2i, t2i_correct = contrastive_rows(contrast.text_BD, contrast.all_image_GD, contrast.scale, label_B)
    count = i2t.new_tensor(batch)
    loss = collector.global_mean((i2t + t2i) / 2, count)
    return loss, {"i2t_accuracy": (i2t_correct, count), "t2i_accuracy": (t2i_correct, count)}
