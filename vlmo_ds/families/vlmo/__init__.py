"""VLMo (arXiv:2111.02358): one transformer with an expert for each modality, pretrained in stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmo_ds.families.interface import Clamp, Family, TokenizerNeeds, imported
from vlmo_ds.families.vlmo.config import HEADS, NO_DECAY, PIXELS, TASKS, TRAINABLE, WORDS, VLMoInit, VLMoSettings

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.vlmo.model import VLMo

MAX_SCALE, NEAR_MAX_SCALE = 100.0, (0.0, 90.0)  # of contrastive logits (CLIP, arXiv:2103.00020, section 2.5)


def build(config: VLMoSettings, tasks: Mapping[str, float], collector: Collector | None = None) -> VLMo:
    from vlmo_ds.families.vlmo.model import VLMo

    return VLMo(config, tasks, collector)


FAMILY = Family(
    name="vlmo",
    config=VLMoSettings,
    init=VLMoInit,
    tasks=TASKS,
    trainable=TRAINABLE,
    no_decay=NO_DECAY,
    heads=HEADS,
    words=WORDS,
    clamped=(
        Clamp("logit_scale", None, math.log(MAX_SCALE), "itc/logit_scale", NEAR_MAX_SCALE),
        Clamp("logit_vl_scale", None, math.log(MAX_SCALE), "itc/vl_logit_scale", NEAR_MAX_SCALE),
    ),
    pixels=PIXELS,
    tokenizer=TokenizerNeeds(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), padding=0),
    build=build,
    cost=imported("vlmo_ds.families.vlmo.cost"),
    weights=imported("vlmo_ds.families.vlmo.weights"),
    huggingface=imported("vlmo_ds.families.vlmo.huggingface"),
    parity=imported("vlmo_ds.families.vlmo.parity", "FORMATS"),
)
