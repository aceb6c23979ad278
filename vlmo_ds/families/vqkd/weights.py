"""The reference's files for the visual tokenizer, and another image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmo_ds.blocks.resample import resize_absolute
from vlmo_ds.config import InitConfig
from vlmo_ds.families.vqkd.config import VQKDSettings

POSITIONS = ("encoder.pos_embed", "decoder.pos_embed")
OF_TEACHER = (
    "teacher_model.",
    "scaling_layer.",
    "scaling_layer_for_teacher.",
)  # of a file that has its teacher as well


def convert(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: VQKDSettings, init: InitConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(source with positions of the model's shapes and without a teacher, what was changed). own: the model's state dict."""
    found = {name: value for name, value in source.items() if not name.startswith(OF_TEACHER)}
    changed = [f"{len(source) - len(found)} tensors of a teacher left out"] if len(found) < len(source) else []
    for name in POSITIONS:
        there, here = (tuple(weights[name].shape) if name in weights else () for weights in (found, own))
        if there != here and there[2:] == here[2:]:
            found[name] = resize_absolute(found[name], here[1])
            changed.append(f"{name} {list(there)} -> {list(here)}: bicubic")
    return found, changed


def fresh(init: InitConfig) -> Sequence[str]:
    return ()


def finish(model: Any, init: InitConfig) -> None:
    pass


def official(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"model": dict(weights)}
