"""Image-text matching with hard negatives (ALBEF, arXiv:2107.07651, section 3.3, over the global batch as in VLMo)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Draw


@dataclass
class Negatives:
    """Global row numbers: the wrong image for each text of this rank, the wrong text for each image."""

    image_B: Tensor
    text_B: Tensor


def draws_of(
    sample_id_B: Tensor, image_id_B: Tensor, seed: int, collector: Collector, key_BK: Tensor | None = None
) -> tuple[Draw, Draw]:
    """How one wrong text per image and one wrong image per text are drawn among the pairs of all ranks. key_BK: what makes pairs each other's
    positives, None: the image alone."""
    key_BK = image_id_B[:, None] if key_BK is None else key_BK
    ids_GC = collector.gather(torch.cat((sample_id_B[:, None], key_BK), dim=1))
    text, image = (Draw(2 * seed + of, sample_id_B, ids_GC[:, 0], key_BK, ids_GC[:, 1:]) for of in (1, 0))
    return text, image


def itm_loss(logits_3B2: Tensor, collector: Collector) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Two-way cross-entropy; rows are the matched pairs, then text with wrong image, then wrong text with image."""
    batch = len(logits_3B2) // 3
    labels = torch.zeros(3 * batch, dtype=torch.long, device=logits_3B2.device)
    labels[:batch] = 1
    logits = logits_3B2.to(torch.promote_types(logits_3B2.dtype, torch.float32))
    count = logits.new_tensor(3 * batch)
    loss = collector.global_mean(F.cross_entropy(logits, labels, reduction="sum"), count)
    return loss, {"accuracy": ((logits.argmax(1) == labels).sum(), count)}
