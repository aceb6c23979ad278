"""Masked language modelling: from an image-text pair (mlm) or from text alone (textmlm)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector

IGNORE = -100


def mlm_loss(
    tokens_BLD: Tensor, labels_BL: Tensor, head: Callable[[Tensor], Tensor], collector: Collector
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Cross-entropy at the masked positions, averaged over the masked tokens of the global batch (BERT).

    tokens_BLD: encodings of the text; labels_BL: the original id where masked, -100 elsewhere. The vocabulary
    projection sees the masked positions only. The softmax is in float32 at least.
    """
    masked = (labels_BL != IGNORE).flatten().nonzero().squeeze(1)
    logits_MV = head(tokens_BLD.flatten(0, 1)[masked])
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    labels_M = labels_BL.flatten()[masked]
    count = labels_BL.new_tensor(len(masked))
    loss = collector.global_mean(F.cross_entropy(logits_MV, labels_M, reduction="sum"), count.to(logits_MV.dtype))
    return loss, {"accuracy": ((logits_MV.argmax(1) == labels_M).sum(), count)}
