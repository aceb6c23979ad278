"""Weights as a stage writes them, at its end or for others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlmo_ds.data.storage import mode_of_umask, write_atomically
from vlmo_ds.families.interface import matches
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.manifest import crc32, write_manifest
from vlmo_ds.weights_file import RESULTS, STAGE, WEIGHTS


def frozen_state(model: FamilyModel) -> dict[str, Tensor]:
    """Float32 copies of what neither has a gradient nor is averaged."""
    still = ((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    return {n: p.detach().float().cpu().clone() for n, p in still if not matches(n, model.family.averaged)}


REPLACED = ".replaced.tmp"  # end of the name that a folder has while another takes its place


def write_result(folder: Path, state: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Publishes weights of a stage in one rename (rank 0). What the folder held before goes once the new one is there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(state), temporary / WEIGHTS, metadata={"format": "pt"})
    mode_of_umask(temporary / WEIGHTS)
    write_atomically(temporary / STAGE, json.dumps(meta, indent=1).encode())
    write_manifest(temporary, {name: crc32(temporary / name) for name in (WEIGHTS, STAGE)})
    sync(temporary / WEIGHTS)
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        folder.replace(replaced)
    temporary.replace(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Gives a stage's result its name back where a start was killed between two renames; removes it where the new one is there."""
    for name in RESULTS:
        replaced = folder / (name + REPLACED)
        if replaced.is_dir() and not (folder / name).exists():
            replaced.replace(folder / name)
        shutil.rmtree(replaced, ignore_errors=True)


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
