"""Checkpoints of other code bases: VLMo's and BEiT's files, BERT's embeddings. Nothing in them is executed."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmo_ds.config import ModelConfig, RecipeError
from vlmo_ds.interop.resize import TABLE
from vlmo_ds.manifest import MANIFEST, fault_of
from vlmo_ds.models.position import num_distances, num_image_distances

WEIGHTS, STAGE = "model.safetensors", "stage.json"  # in a stage's final folder
NESTED = ("state_dict", "module", "model")  # where the official releases keep the weights
INDEX_BUFFERS = re.compile(r"(.*\.)?(text_|text_imag_)?relative_position_index")
BEIT_ONLY = ("fc_norm.", "head.", "lm_head.")
BERT = re.compile(
    r"(?:bert\.)?embeddings\.(word_embeddings|position_embeddings|token_type_embeddings|LayerNorm)\.(\w+)"
)
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of LayerNorm in BERT's first releases


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


def to_vlmo(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """(the weights under VLMo's names, what was changed): BEiT's and BERT's files are known by their names."""
    kept = {name: value for name, value in state.items() if not INDEX_BUFFERS.fullmatch(name)}
    changed = [f"{len(state) - len(kept)} index buffers left out"] if len(kept) < len(state) else []
    if "patch_embed.proj.weight" in kept:
        kept, notes = from_beit(kept, config)
        changed += notes
    elif any(BERT.fullmatch(name) for name in kept):
        kept, notes = from_bert(kept)
        changed += notes
    return kept, changed


def from_beit(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """BEiT's layers become the attention and the vision experts (VLMo, section 3.3).

    Relative position tables, one for each layer or one for all, are put side by side into the first rows of VLMo's one
    table, for BEiT's own image size; the other rows are zero.
    """
    converted: dict[str, Tensor] = {}
    tables: dict[int, Tensor] = {}
    dropped = []
    for name, value in state.items():
        if name.startswith(BEIT_ONLY):
            dropped.append(name)
        elif name == f"rel_pos_bias.{TABLE}":
            tables |= dict.fromkeys(range(config.depth), value)
        elif match := re.fullmatch(rf"blocks\.(\d+)\.attn\.{TABLE}", name):
            tables[int(match[1])] = value
        else:
            name = re.sub(r"^(blocks\.\d+\.)(mlp|norm2)\.", r"\1\2_imag.", name)
            converted[f"transformer.{name}"] = value
    notes = ["BEiT: mlp -> mlp_imag, norm2 -> norm2_imag"]
    if dropped:
        notes.append(f"left out: {', '.join(dropped)}")
    if tables and config.need_relative_position_embed:
        image = torch.cat([tables[layer] for layer in sorted(tables)], dim=1)
        window = window_of_image_rows(len(image))
        whole = image.new_zeros(num_distances(window, config.max_text_len_of_initckpt), image.shape[1])
        whole[: len(image)] = image
        converted[TABLE] = whole
        notes.append(f"tables of {len(tables)} layers for {window} x {window} patches -> {TABLE} {list(whole.shape)}")
    return converted, notes


def window_of_image_rows(rows: int) -> int:
    window = 1
    while num_image_distances(window) < rows:
        window += 1
    if num_image_distances(window) != rows:
        raise RecipeError(f"BEiT's relative position table has {rows} rows, which fits no square image")
    return window


def from_bert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """BERT's embeddings become the text embeddings; its layers are left out."""
    found = {name: BERT.fullmatch(name) for name in state}
    converted = {
        f"text_embeddings.{match[1]}.{OLD_NAMES.get(match[2], match[2])}": state[name]
        for name, match in found.items()
        if match
    }
    return converted, [f"BERT: {len(converted)} tensors of its embeddings, {len(state) - len(converted)} left out"]
