"""Files of weights, of this project's runs and of other code bases. Nothing in them is executed."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmo_ds.config import RecipeError
from vlmo_ds.manifest import MANIFEST, fault_of

FINAL, EMA, BEST = RESULTS = (
    "final",
    "ema",
    "best",
)  # folders of a stage: its last weights, their moving average, those of the best score
WEIGHTS, STAGE = "model.safetensors", "stage.json"  # in each of them
NESTED = ("state_dict", "module", "model")  # where releases keep the weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a stage's folder, a .safetensors file, or a PyTorch file (tensors and arguments only; nested or not).

    Raises RecipeError for what is no state dict, saying what it is and what to do.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"initial weights: {what_it_is(path, file)}")
    if path.is_dir() and (path / MANIFEST).exists() and (fault := fault_of(path, (0, 1))):
        raise RecipeError(f"initial weights: {path} is damaged: {fault}")
    found: Any
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # a table of values, which many files carry along
                found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RecipeError(f"initial weights: {file} cannot be read as tensors ({unreadable(error)})") from None
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise RecipeError(f"initial weights: {file} holds no state dict (names and tensors)")
    empty = [name for name, value in found.items() if value.numel() == 0]
    if len(empty) > len(found) // 2:
        raise RecipeError(
            f"initial weights: {file} holds {len(empty)} empty tensors ({empty[0]}, ...): it is one rank's file of a ZeRO-3 "
            "checkpoint of DeepSpeed, whose weights lie in other files: make one file of them with the zero_to_fp32.py beside it"
        )
    return {name.removeprefix("module."): value for name, value in found.items()}


def what_it_is(path: Path, file: Path) -> str:
    """Why a path gives no file of weights, and what would."""
    if (path / "latest").is_file() or any(path.glob("mp_rank_*_model_states.pt")):
        return (
            f"{path} is a checkpoint of DeepSpeed, for one number of ranks and one ZeRO stage: make one file of it with the "
            "zero_to_fp32.py beside it"
        )
    if any(path.glob("rank-*.safetensors")):
        return (
            f"{path} is a checkpoint within a stage: make one file of it with "
            f"`python -m vlmo_ds.training.checkpoint consolidate {path}`, or name the stage's final folder"
        )
    return f"{file} does not exist; accepted: a stage's final folder, a .safetensors or .pt file"


def unreadable(error: Exception) -> str:
    """A loader's error in a line; for pickled objects, which could run code, what to do."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a pickled {found[1]}, and pickles can run code: in an environment where you trust it, save the weights "
            "alone, as in torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pt')"
        )
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def vocabulary_of(path: Path) -> str | None:
    """The digest of the vocabulary that a stage's result was trained with; None where nothing says."""
    try:
        return json.loads((path / STAGE).read_bytes()).get("vocabulary")
    except (OSError, ValueError, AttributeError):
        return None
