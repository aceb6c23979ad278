"""BLIP (arXiv:2201.12086): contrast with a teacher, matching and captioning on one text stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmo_ds.config import InitConfig
from vlmo_ds.families.blip.config import (
    AVERAGED,
    HEADS,
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    NO_DECAY,
    PIXELS,
    TASKS,
    TRAINABLE,
    WORDS,
    BLIPSettings,
)
from vlmo_ds.families.interface import Clamp, Family, TokenizerNeeds, imported

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.blip.base import BLIPModel


def build(config: BLIPSettings, tasks: Mapping[str, float], collector: Collector | None = None) -> BLIPModel:
    if "vqa" in tasks:
        from vlmo_ds.families.blip.downstream import BLIPForQuestions

        return BLIPForQuestions(config, tasks, collector)
    if "nlvr2" in tasks:
        from vlmo_ds.families.blip.downstream import BLIPForImagePairs

        return BLIPForImagePairs(config, tasks, collector)
    from vlmo_ds.families.blip.model import BLIP

    return BLIP(config, tasks, collector)


FAMILY = Family(
    name="blip",
    config=BLIPSettings,
    init=InitConfig,
    tasks=TASKS,
    trainable=TRAINABLE,
    no_decay=NO_DECAY,
    heads=HEADS,
    words=WORDS,
    averaged=[f"{name}*" for name in AVERAGED],
    clamped=(Clamp("temp", LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, "itc/temperature", (0.002, 0.45)),),
    pixels=PIXELS,
    tokenizer=TokenizerNeeds(("cls_token", "sep_token", "pad_token"), padding=None),
    build=build,
    cost=imported("vlmo_ds.families.blip.cost"),
    weights=imported("vlmo_ds.families.blip.weights"),
    huggingface=imported("vlmo_ds.families.blip.huggingface"),
    parity=imported("vlmo_ds.families.blip.parity", "FORMATS"),
)
