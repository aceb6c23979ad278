"""What BLIP's models share: an image tower and a text stack, and how they begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.layers import init_weights, normalize
from vlmo_ds.blocks.position import begin_positions
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.blip import FAMILY
from vlmo_ds.families.blip.config import PIXELS, BLIPSettings
from vlmo_ds.families.blip.text import TextEncoder, at_images
from vlmo_ds.families.blip.vision import VisionTransformer
from vlmo_ds.families.step import Batch, FamilyModel


class BLIPModel(FamilyModel):
    """Image tower and text stack. Models of a kind of tasks add what these need, then call reset_parameters."""

    family = FAMILY
    config: BLIPSettings
    crossattention: Callable[[BLIPSettings, int], nn.Module] = staticmethod(at_images)  # of a layer of the text stack
    heads: ClassVar[tuple[str, ...]] = ()  # beginnings of names: linear layers that begin as the text stack's do

    def __init__(self, config: BLIPSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        self.visual_encoder = VisionTransformer(config, self.recomputed)
        self.text_encoder = TextEncoder(config, self.recomputed, self.crossattention)

    def reset_parameters(self) -> None:
        """Truncated normal in the image tower, normal in the text stack (BERT)."""
        self.recomputed.tell(self)
        self.visual_encoder.apply(partial(init_weights, std=self.config.init_std))
        begin_positions(self.visual_encoder.pos_embed, self.config.position_init, self.config.position_std)
        nn.init.trunc_normal_(self.visual_encoder.cls_token, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith(("text_", *self.heads)) and parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.startswith(("text_", *self.heads)) and name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def unwritten(self) -> list[int]:
        return [self.config.decode_word, self.config.encode_word]

    @property
    def cached_layers(self) -> int:
        """Layers that have a cache when words are written."""
        return self.config.text_layers

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 image [B, 3, S, S] -> normalised, in the model's dtype."""
        return normalize(image, *PIXELS, self.text_encoder.embeddings.LayerNorm.weight.dtype)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """text_ids, text_masks [B, L] -> (the ids with [ENC] as their first word, lengths [B]): texts that look at images."""
        return begun_with(self.config.encode_word, batch["text_ids"]), batch["text_masks"].sum(1)

    def newest(self, batch: Mapping[str, Any]) -> Tensor:
        """text_ids [R, L], the newest words of texts that are written, first: words before them -> the same; a text begins with [DEC],
        whatever its first word."""
        ids_RL = batch["text_ids"]
        return begun_with(self.config.decode_word, ids_RL) if batch["first"] == 0 else ids_RL


def begun_with(word: int, ids_BL: Tensor) -> Tensor:
    """The texts with another first word."""
    return torch.cat((torch.full_like(ids_BL[:, :1], word), ids_BL[:, 1:]), dim=1)
