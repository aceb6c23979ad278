"""BEiT-3 (arXiv:2208.10442): one transformer of modality experts, pretrained by masked data modelling of images, texts and pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmo_ds.config import InitConfig
from vlmo_ds.families.beit3.config import HEADS, NO_DECAY, PIXELS, TASKS, TRAINABLE, WORDS, BEiT3Settings
from vlmo_ds.families.interface import Clamp, Family, TokenizerNeeds, imported

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.beit3.model import BEiT3

MAX_SCALE, NEAR_MAX_SCALE = 100.0, (0.0, 90.0)  # of contrastive logits (CLIP, arXiv:2103.00020, section 2.5)


def build(config: BEiT3Settings, tasks: Mapping[str, float], collector: Collector | None = None) -> BEiT3:
    from vlmo_ds.families.beit3.model import BEiT3

    return BEiT3(config, tasks, collector)


FAMILY = Family(
    name="beit3",
    config=BEiT3Settings,
    init=InitConfig,
    tasks=TASKS,
    trainable=TRAINABLE,
    no_decay=NO_DECAY,
    heads=HEADS,
    words=WORDS,
    clamped=(Clamp("logit_scale", None, math.log(MAX_SCALE), "itc/logit_scale", NEAR_MAX_SCALE),),
    pixels=PIXELS,
    tokenizer=TokenizerNeeds(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), padding=None),
    build=build,
    cost=imported("vlmo_ds.families.beit3.cost"),
    weights=imported("vlmo_ds.families.beit3.weights"),
    huggingface=imported("vlmo_ds.families.beit3.huggingface"),
    parity=imported("vlmo_ds.families.beit3.parity", "FORMATS"),
)
