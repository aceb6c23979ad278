"""Masked image modelling for the image-only stage."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector


class MIMTarget(Protocol):
    """What a masked patch is to be predicted as. A visual-token target is one more class of this shape."""

    dim: int  # width of the head's output

    def target(self, image_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> targets [B, P, ...], patches row by row."""
        ...

    def loss(self, prediction_MD: Tensor, target_M: Tensor) -> Tensor:
        """Per masked patch, [M]."""
        ...


class NormalizedPixels:
    """The patch's own pixels with zero mean and unit variance, mean squared error (MAE, arXiv:2111.06377, sec. 3)."""

    def __init__(self, patch_size: int):
        self.patch_size = patch_size
        self.dim = 3 * patch_size**2

    def target(self, image_BCHW: Tensor) -> Tensor:
        patches_BP = F.unfold(image_BCHW.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)
        variance, mean = torch.var_mean(patches_BP, dim=-1, keepdim=True)
        return (patches_BP - mean) / (variance + 1e-6).sqrt()

    def loss(self, prediction_MD: Tensor, target_M: Tensor) -> Tensor:
        return (prediction_MD.to(target_M.dtype) - target_M).square().mean(-1)


def mim_loss(
    prediction_MD: Tensor, image_BCHW: Tensor, mask_BP: Tensor, target: MIMTarget, collector: Collector
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Loss at the masked patches, averaged over those of the global batch (BEiT, arXiv:2106.08254).

    prediction_MD: of the masked patches, image after image; mask_BP: bool, which these are.
    """
    loss_M = target.loss(prediction_MD, target.target(image_BCHW)[mask_BP])
    return collector.global_mean(loss_M.sum(), loss_M.new_tensor(len(loss_M))), {}
