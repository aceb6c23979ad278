"""How the numbers of a model are compared with recorded ones."""

from __future__ import annotations

import torch
from torch import Tensor

BARS = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-5, 1e-4)}  # (features, logits, losses), gradients


def relative_difference(ours: Tensor, recorded: Tensor) -> float:
    ours, recorded = ours.detach().double(), recorded.detach().double()
    if ours.shape != recorded.shape:
        return float("inf")
    norm = recorded.norm()
    return float((ours - recorded).norm() / norm) if norm > 0 else float(ours.norm())
