"""Visual question answering as classification over a fixed list of answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector


def vqa_loss(
    logits_BA: Tensor, targets_BA: Tensor, collector: Collector
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Binary cross-entropy with soft targets, summed over the answers (bottom-up attention, arXiv:1707.07998; the
    reference: its mean times the number of answers), averaged over the questions of the global batch.

    targets_BA: scores in [0, 1]. The score reported is the target's value for the answer with the highest logit.
    """
    logits = logits_BA.to(torch.promote_types(logits_BA.dtype, torch.float32))
    targets = targets_BA.to(logits.dtype)
    count = logits.new_tensor(len(logits))
    loss = collector.global_mean(F.binary_cross_entropy_with_logits(logits, targets, reduction="sum"), count)
    score = targets.gather(1, logits.argmax(1, keepdim=True)).sum()
    return loss, {"score": (score, count)}
