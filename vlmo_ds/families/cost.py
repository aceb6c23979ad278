"""What the contrastive loss costs in every family: memory and bytes on the wire. For the families' own cost.py.

tables: of contrastive features, 2 for image and text; width: of a feature.
"""

from __future__ import annotations

from vlmo_ds.config import StageConfig
from vlmo_ds.distributed.rows import CHUNK
from vlmo_ds.families.interface import Load


def contrast_memory(tables: int, width: int, stage: StageConfig, load: Load) -> tuple[float, float]:
    """Bytes on a rank: (features of the global batch and their gradients, a chunk of logits)."""
    rows = load.micro * (load.accumulation if stage.gradient_cache else 1)
    return 2 * tables * rows * load.ranks * width * 4, 2 * rows * min(CHUNK, rows * load.ranks) * 4


def contrast_wire(tables: int, width: int, load: Load) -> float:
    """Bytes that a rank receives in an optimiser step for the features, and as many again for their gradients."""
    features = tables * load.micro * load.ranks * width * 4
    return (load.ranks - 1) / load.ranks * features * load.accumulation
