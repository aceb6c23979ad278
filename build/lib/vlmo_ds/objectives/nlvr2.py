"""Natural language visual reasoning: is a sentence true of two images? (arXiv:1811.00491)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector


def nlvr2_loss(
    logits_B2: Tensor, answers_B: Tensor, collector: Collector
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Two-way cross-entropy over the global batch. answers_B: int64, 1 = true."""
    logits = logits_B2.to(torch.promote_types(logits_B2.dtype, torch.float32))
    count = logits.new_tensor(len(logits))
    loss = collector.global_mean(F.cross_entropy(logits, answers_B, reduction="sum"), count)
    return loss, {"accuracy": ((logits.argmax(1) == answers_B).sum(), count)}
