"""Weights: handed from stage to stage, and written at a stage's end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.data.storage import mode_of_umask, write_atomically
from vlmo_ds.interop.official import STAGE, WEIGHTS, to_vlmo
from vlmo_ds.interop.resize import fit
from vlmo_ds.manifest import crc32, write_manifest
from vlmo_ds.models.vlmo import VLMo
from vlmo_ds.training.optim import matches


def hand_over(model: VLMo, source: Mapping[str, Tensor], init: InitConfig, origin: str) -> dict[str, list[str]]:
    """Loads weights into a new stage's model. Every key on either side is accounted for.

    Files of BEiT and BERT get VLMo's names, positions are fitted to the model's image size and text length. Returns what
    became of the weights: {"loaded", "fresh", "dropped", "converted"}. Raises RecipeError for a key that is missing,
    unexpected, or of another shape, unless `init` names it.
    """
    own = model.state_dict()
    source, converted = to_vlmo(source, model.config)
    source, fitted = fit(source, own, model.config, init.max_text_len_of_initckpt)
    fresh_patterns = list(init.fresh)
    if init.vl_experts != "keep":
        fresh_patterns += ["transformer.blocks.*.mlp_vl.*", "transformer.blocks.*.norm2_vl.*"]
    loaded = [k for k in own if k in source and not matches(k, fresh_patterns)]
    fresh = [k for k in own if matches(k, fresh_patterns)]
    dropped = [k for k in source if k not in own and matches(k, [*init.drop, *fresh_patterns])]
    missing = [k for k in own if k not in source and k not in fresh]
    unexpected = [k for k in source if k not in own and k not in dropped]
    shapes = [k for k in loaded if own[k].shape != source[k].shape]
    problems = []
    if shapes:
        k = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape: {k} is {list(source[k].shape)} there and {list(own[k].shape)} in this model "
            "(a checkpoint of another architecture or vocabulary)"
        )
    if missing:
        problems.append(f"{len(missing)} missing there: {brief(missing)} (name them in init.fresh to start them fresh)")
    if unexpected:
        problems.append(
            f"{len(unexpected)} that this stage does not have: {brief(unexpected)} (name them in init.drop to leave them)"
        )
    for pattern in init.fresh:
        if not any(matches(k, [pattern]) for k in own):
            problems.append(f"init.fresh: '{pattern}' fits no weight of this model")
    if problems:
        raise RecipeError(f"weights from {origin} do not fit:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for k in loaded:
            own[k].copy_(source[k])
    if init.vl_experts in ("text", "image"):
        model.init_vl_experts({"text": "text", "image": "imag"}[init.vl_experts])
    return {"loaded": loaded, "fresh": fresh, "dropped": dropped, "converted": converted + fitted}


def brief(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if not p.requires_grad}


def write_final(folder: Path, state: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Publishes a stage's result in one rename (rank 0)."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(state), temporary / WEIGHTS, metadata={"format": "pt"})
    mode_of_umask(temporary / WEIGHTS)
    write_atomically(temporary / STAGE, json.dumps(meta, indent=1).encode())
    write_manifest(temporary, {name: crc32(temporary / name) for name in (WEIGHTS, STAGE)})
    sync(temporary / WEIGHTS)
    temporary.replace(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Onto the disk itself, so that a power cut leaves what the names promise."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_weights(output: Path, weights: dict[str, Tensor]) -> None:
    """One .safetensors file, published in one rename."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
        mode_of_umask(temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
