"""CoCa (arXiv:2205.01917): image and text towers and a decoder, trained by contrast and captioning in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmo_ds.config import InitConfig
from vlmo_ds.families.coca.config import NO_DECAY, PIXELS, TASKS, TRAINABLE, WORDS, CoCaSettings
from vlmo_ds.families.interface import Clamp, Family, TokenizerNeeds, imported

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.coca.model import CoCa


def build(config: CoCaSettings, tasks: Mapping[str, float], collector: Collector | None = None) -> CoCa:
    from vlmo_ds.families.coca.model import CoCa

    return CoCa(config, tasks, collector)


def to_open_clip(config: CoCaSettings) -> tuple[dict[str, Any], str]:
    from vlmo_ds.families.coca import weights

    return weights.to_open_clip(config)


FAMILY = Family(
    name="coca",
    config=CoCaSettings,
    init=InitConfig,
    tasks=TASKS,
    trainable=TRAINABLE,
    no_decay=NO_DECAY,
    heads=(),
    words=WORDS,
    clamped=(Clamp("logit_scale", 0.0, math.log(100), "itc/logit_scale", (1.1, 90.0)),),  # as open_clip
    pixels=PIXELS,
    tokenizer=TokenizerNeeds((), padding=None),
    build=build,
    cost=imported("vlmo_ds.families.coca.cost"),
    weights=imported("vlmo_ds.families.coca.weights"),
    huggingface=imported("vlmo_ds.families.coca.huggingface"),
    parity=imported("vlmo_ds.families.coca.parity", "FORMATS"),
    open_clip=to_open_clip,
)
