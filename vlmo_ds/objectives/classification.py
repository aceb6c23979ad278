"""One of some classes: of an image, or whether a sentence is true of two images (NLVR2, arXiv:1811.00491)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector


def classification_loss(
    logits_BC: Tensor, labels_B: Tensor, collector: Collector, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Cross-entropy over the global batch. labels_B: int64; smoothing: share of a target that is spread over all classes."""
    logits = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    count = logits.new_tensor(len(logits))
    total = F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=smoothing)
    return collector.global_mean(total, count), {"accuracy": ((logits.argmax(1) == labels_B).sum(), count)}
