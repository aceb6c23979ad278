"""Weights of other origins for VLMo: BEiT's files, BERT's embeddings, another image size or text length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlmo_ds.blocks.position import num_distances, num_image_distances
from vlmo_ds.blocks.resample import first_rows, resample_distances, resize_absolute
from vlmo_ds.config import RecipeError
from vlmo_ds.families.vlmo.config import VLMoInit, VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo

INDEX_BUFFERS = re.compile(r"(.*\.)?(text_|text_imag_)?relative_position_index")
BEIT_ONLY = ("fc_norm.", "head.", "lm_head.", "cls_pt_layers.")
BERT = re.compile(
    r"(?:bert\.)?embeddings\.(word_embeddings|position_embeddings|token_type_embeddings|LayerNorm)\.(\w+)"
)
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of LayerNorm in BERT's first releases
TABLE = "relative_position_bias_table"
IMAGE_POSITIONS = "transformer.pos_embed"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
TEXT_POSITION_IDS = "text_embeddings.position_ids"
TOKEN_TYPES = "token_type_embeddings.weight"
VL_EXPERTS = ["transformer.blocks.*.mlp_vl.*", "transformer.blocks.*.norm2_vl.*"]


def convert(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: VLMoSettings, init: VLMoInit
) -> tuple[dict[str, Tensor], list[str]]:
    """(source under VLMo's names with positions of the model's shapes, what was changed). own: the model's state dict."""
    named, converted = to_vlmo(source, config)
    fitted, changed = fit(named, own, config, init.max_text_len_of_initckpt)
    return fitted, converted + changed


def fresh(init: VLMoInit) -> list[str]:
    """Patterns of the VL experts where they do not come from the source."""
    return [] if init.vl_experts == "keep" else VL_EXPERTS


def finish(model: VLMo, init: VLMoInit) -> None:
    """Fills the VL experts with copies where that is asked for."""
    if init.vl_experts in ("text", "image"):
        model.init_vl_experts({"text": "text", "image": "imag"}[init.vl_experts])


def to_vlmo(state: Mapping[str, Tensor], config: VLMoSettings) -> tuple[dict[str, Tensor], list[str]]:
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


def from_beit(state: Mapping[str, Tensor], config: VLMoSettings) -> tuple[dict[str, Tensor], list[str]]:
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
            converted[vlmo_name(name)] = value
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


def vlmo_name(name: str) -> str:
    """BEiT's name of a weight -> VLMo's."""
    return "transformer." + re.sub(r"^(blocks\.\d+\.)(mlp|norm2)\.", r"\1\2_imag.", name)


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


def fit(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: VLMoSettings, source_text_len: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """(source with positions of the model's shapes, what was changed).

    own: the model's state dict, whose values stay where the source has none; source_text_len: the source's
    max_text_len_of_initckpt, null: the model's. Raises RecipeError where the source's sizes cannot be told.
    """
    fitted, changed = dict(source), []

    def change(name: str, value: Tensor, how: str) -> None:
        fitted[name] = value
        changed.append(f"{name} {list(source[name].shape)} -> {list(value.shape)}: {how}")

    def differs(name: str) -> bool:
        return name in source and name in own and source[name].shape != own[name].shape

    if differs(TABLE) and source[TABLE].shape[1] == own[TABLE].shape[1]:
        text_len = source_text_len or config.max_text_len_of_initckpt
        before, after = window_of(source[TABLE], text_len), config.image_size // config.patch_size
        value = resize_relative(source[TABLE], before, after, text_len, own[TABLE], config.max_text_len_of_initckpt)
        change(TABLE, value, f"{before} x {before} to {after} x {after} patches")
    if differs(IMAGE_POSITIONS) and source[IMAGE_POSITIONS].shape[2] == own[IMAGE_POSITIONS].shape[2]:
        change(IMAGE_POSITIONS, resize_absolute(source[IMAGE_POSITIONS], own[IMAGE_POSITIONS].shape[1]), "bicubic")
    if differs(TEXT_POSITIONS) and source[TEXT_POSITIONS].shape[1] == own[TEXT_POSITIONS].shape[1]:
        how = "cut" if len(source[TEXT_POSITIONS]) > len(own[TEXT_POSITIONS]) else "the further ones start fresh"
        change(TEXT_POSITIONS, first_rows(source[TEXT_POSITIONS], own[TEXT_POSITIONS]), how)
    if TEXT_POSITION_IDS in own:  # 0, 1, 2, ...: no weights
        fitted[TEXT_POSITION_IDS] = own[TEXT_POSITION_IDS]
    if differs(TOKEN_TYPES) and {len(source[TOKEN_TYPES]), len(own[TOKEN_TYPES])} == {2, 3}:
        both = source[TOKEN_TYPES][[0, 1, 1][: len(own[TOKEN_TYPES])]]
        change(TOKEN_TYPES, both, "a second image begins as the first" if len(both) == 3 else "cut")
    return fitted, changed


def window_of(table: Tensor, text_len: int) -> int:
    """Patches per side that a relative position table was made for."""
    grid = len(table) - num_distances(1, text_len) + 1
    side = math.isqrt(grid) if grid > 0 else 0
    if side * side != grid or side % 2 == 0:
        raise RecipeError(
            f"the relative position table has {len(table)} rows, which fits no image size with texts of "
            f"max_text_len_of_initckpt {text_len}: set init.max_text_len_of_initckpt to the checkpoint's"
        )
    return (side + 1) // 2


def resize_relative(table: Tensor, before: int, after: int, text_len: int, own: Tensor, own_text_len: int) -> Tensor:
    """[distances, layers x heads] for `before` x `before` patches -> for `after` x `after`; the same dtype.

    Distances between patches are resampled as in BEiT's fine-tuning (arXiv:2106.08254): the known ones are thought to lie
    at geometrically growing distances, the new ones at equal distances, with a cubic spline between. Class and text
    entries stay; distances between words that are beyond the source's begin as in `own`.
    """
    patches = (2 * before - 1) ** 2
    grid, rest, words = table[:patches], table[patches : -2 * text_len], table[-2 * text_len :]
    if before != after:
        grid = resample_distances(grid, 2 * before - 1, 2 * after - 1)
    if text_len != own_text_len:
        reach = min(text_len, own_text_len) - 2  # the farthest distance that both know, either way
        known = words
        words = own[-2 * own_text_len :].to(table.dtype, copy=True)
        words[own_text_len - 2 - reach : own_text_len - 1 + reach] = known[text_len - 2 - reach : text_len - 1 + reach]
        words[-3:] = known[-3:]
    return torch.cat((grid, rest, words))


def official(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"state_dict": dict(weights)}
