"""Image-text contrast over the global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Contrasted, Draw, contrast, mix, sigmoid_contrast

MAX_LOG_SCALE = math.log(100.0)  # CLIP, arXiv:2103.00020, section 2.5


def logit_parameters(kind: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Logarithm of the scale of contrastive logits, and their bias, None for the softmax loss; initial values of CLIP and of SigLIP."""
    if kind == "sigmoid":
        return nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-10.0))
    return nn.Parameter(torch.tensor(math.log(1 / 0.07))), None


def scale_of(log_scale: Tensor, like: Tensor) -> Tensor:
    """0-d, in the dtype of `like`. At most 100; past it the value stays and the gradient still flows, so that it can come back."""
    log_scale = log_scale.reshape(()).to(like.dtype)
    return (log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()).exp()


def keys_of(image_id_B: Tensor, ids_BL: Tensor, masks_BL: Tensor) -> Tensor:
    """What pairs are known by, [B, 2] int64: the picture, and the words of the caption, padding aside."""
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    words_B = (mix((ids_BL << 20) + place_L) * masks_BL).sum(1)
    return torch.stack((image_id_B, words_B), dim=1)


def keys_where(positives: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under "keys" what pairs are known by, where others than themselves may be their positives (the setting model.positives)."""
    if positives == "pair":
        return {}
    return {"keys": keys_of(batch["image_id"], batch["text_ids"], batch["text_masks"])}


def loss_of(
    found: Mapping[str, Tensor], collector: Collector, prefix: str = "", draws: tuple[Draw, Draw] | None = None
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Contrasted, dict[str, Tensor]]:
    """itc_loss of what a model has found, and the values of its scale and bias. found: features image, text; logit_scale, and with the sigmoid
    loss logit_bias; all of these with a prefix; and what keys_where gives."""
    image, text = found[f"{prefix}image"], found[f"{prefix}text"]
    scale, bias = scale_of(found[f"logit_{prefix}scale"], image), found.get(f"logit_{prefix}bias")
    values = {f"itc/{prefix}logit_scale": scale.detach()}
    if bias is not None:
        bias = bias.reshape(()).to(image.dtype)
        values[f"itc/{prefix}logit_bias"] = bias.detach()
    return *itc_loss(image, text, scale, collector, draws, found.get("keys"), bias), values


def itc_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    collector: Collector,
    draws: tuple[Draw, Draw] | None = None,
    key_BK: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Contrasted]:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv:2103.00020; VLMo, section 3.2); with a bias the sigmoid
    loss, over the number of pairs (SigLIP, arXiv:2303.15343, equation 2).

    image_BD, text_BD: features of this rank, of unit length, float32 at least; scale, bias: 0-d; draws, key_BK: as of contrast, whose result
    comes last.
    """
    if bias is None:
        found = contrast(image_BD, text_BD, scale, collector, draws, key_BK)
    else:
        found = sigmoid_contrast(image_BD, text_BD, scale, bias, collector, draws, key_BK)
    count = found.loss.detach().new_tensor(len(image_BD))
    ratios = {"i2t_accuracy": (found.i2t_right, count), "t2i_accuracy": (found.t2i_right, count)}
    return collector.global_mean(found.loss, count), ratios, found
