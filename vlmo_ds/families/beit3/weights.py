"""Weights of other origins for BEiT-3: the official files, which have the names of this project's, for another image size or text length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmo_ds.blocks.resample import first_rows, resize_absolute
from vlmo_ds.config import InitConfig
from vlmo_ds.families.beit3.config import UNUSED_POSITIONS, BEiT3Settings
from vlmo_ds.families.beit3.model import BEiT3

IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"
TEXT_POSITIONS = "beit3.encoder.embed_positions.B.weight"
FINAL_NORM = "beit3.encoder.layer_norm."


def convert(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: BEiT3Settings, init: InitConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(source with positions of the model's shapes and without a final norm that the model does not have, what was changed). own: the
    model's state dict."""
    fitted, changed = dict(source), []

    def differs(name: str) -> bool:
        return (
            name in source
            and name in own
            and source[name].shape[1:] == own[name].shape[1:]
            and len(source[name]) != len(own[name])
        )

    def change(name: str, value: Tensor, how: str) -> None:
        fitted[name] = value
        changed.append(f"{name} {list(source[name].shape)} -> {list(value.shape)}: {how}")

    if differs(IMAGE_POSITIONS):
        change(IMAGE_POSITIONS, resized(source[IMAGE_POSITIONS], len(own[IMAGE_POSITIONS])), "bicubic")
    if differs(TEXT_POSITIONS):
        how = "cut" if len(source[TEXT_POSITIONS]) > len(own[TEXT_POSITIONS]) else "the further ones start fresh"
        change(TEXT_POSITIONS, first_rows(source[TEXT_POSITIONS], own[TEXT_POSITIONS]), how)
    if not any(name.startswith(FINAL_NORM) for name in own):
        left_out = [name for name in fitted if name.startswith(FINAL_NORM)]
        for name in left_out:
            del fitted[name]
        if left_out:
            changed.append(f"{FINAL_NORM}* left out: the head has norms of its own")
    return fitted, changed


def resized(table: Tensor, rows: int) -> Tensor:
    """[2 + 1 + P, D] -> [rows, D]: those of the patches are resampled (bicubic), the others stay."""
    used = resize_absolute(table[None, UNUSED_POSITIONS:], rows - UNUSED_POSITIONS)[0]
    return torch.cat((table[:UNUSED_POSITIONS], used))


def fresh(init: InitConfig) -> list[str]:
    return []


def finish(model: BEiT3, init: InitConfig) -> None:
    pass


def official(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"model": dict(weights)}
