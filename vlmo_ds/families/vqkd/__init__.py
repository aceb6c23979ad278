"""VQ-KD (BEiT v2, arXiv:2208.06366): the tokenizer whose visual tokens masked image modelling predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmo_ds.config import InitConfig
from vlmo_ds.families.interface import Family, TokenizerNeeds, imported
from vlmo_ds.families.vqkd.config import NO_DECAY, PIXELS, TASKS, TRAINABLE, VQKDSettings

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.vqkd.model import VQKD


def build(config: VQKDSettings, tasks: Mapping[str, float], collector: Collector | None = None) -> VQKD:
    from vlmo_ds.families.vqkd.model import VQKD

    return VQKD(config, tasks, collector)


FAMILY = Family(
    name="vqkd",
    config=VQKDSettings,
    init=InitConfig,
    tasks=TASKS,
    trainable=TRAINABLE,
    no_decay=NO_DECAY,
    heads=(),
    words=(),
    clamped=(),
    pixels=PIXELS,
    tokenizer=TokenizerNeeds((), padding=None),
    build=build,
    cost=imported("vlmo_ds.families.vqkd.cost"),
    weights=imported("vlmo_ds.families.vqkd.weights"),
    huggingface=imported("vlmo_ds.families.vqkd.huggingface"),
    parity=imported("vlmo_ds.families.vqkd.parity", "FORMATS"),
)
