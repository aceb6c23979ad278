"""What a decoder's layers ask of the keys and values that generation keeps."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """Keys and values of the tokens so far (generation.decoding.KeyValueCache)."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends a layer's new ones, [R, H, L, D/H]; all of the layer's."""
        ...
