"""Weights of other origins for CoCa: open_clip's files, another image size or text length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlmo_ds.blocks.resample import first_rows, resize_absolute
from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.model import CoCa

IMAGE_POSITIONS, TEXT_POSITIONS = "visual.positional_embedding", "text.positional_embedding"
BUFFERS = ("text.attn_mask", "text_decoder.attn_mask")  # of older files: no weights
POOLS = {False: "none", True: "single", "cascade": "cascade", "parallel": "parallel"}


def convert(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: CoCaSettings, init: InitConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(source with positions of the model's shapes, what was changed). own: the model's state dict."""
    fitted = {name: value for name, value in source.items() if name not in BUFFERS}
    changed = [f"{len(source) - len(fitted)} mask buffers left out"] if len(fitted) < len(source) else []

    def change(name: str, value: Tensor, how: str) -> None:
        changed.append(f"{name} {list(fitted[name].shape)} -> {list(value.shape)}: {how}")
        fitted[name] = value

    def differs(name: str) -> bool:
        return name in fitted and name in own and fitted[name].shape != own[name].shape

    if "logit_scale" in fitted and fitted["logit_scale"].shape == (1,):
        change("logit_scale", fitted["logit_scale"].reshape(()), "one number")
    if differs(IMAGE_POSITIONS) and fitted[IMAGE_POSITIONS].shape[1] == own[IMAGE_POSITIONS].shape[1]:
        change(IMAGE_POSITIONS, resize_absolute(fitted[IMAGE_POSITIONS][None], len(own[IMAGE_POSITIONS]))[0], "bicubic")
    if differs(TEXT_POSITIONS) and fitted[TEXT_POSITIONS].shape[1] == own[TEXT_POSITIONS].shape[1]:
        found, wanted = fitted[TEXT_POSITIONS], own[TEXT_POSITIONS]
        value = first_rows(found[:-1], wanted)
        value[-1] = found[-1]  # the class token's, whatever the context
        how = "cut" if len(found) > len(wanted) else "the further ones start fresh"
        change(TEXT_POSITIONS, value, f"{how}, the class token's stays")
    return fitted, changed


def fresh(init: InitConfig) -> list[str]:
    """CoCa has no settings of its own for that."""
    return []


def finish(model: CoCa, init: InitConfig) -> None:
    """Nor for what comes after."""


def from_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that open_clip's configuration of a model means (its `model_cfg`)."""
    vision, text, decoder = (config[part] for part in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    return {
        "family": "coca",
        "embed_dim": config["embed_dim"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "vision_width": vision["width"],
        "vision_layers": vision["layers"],
        "vision_head_width": vision.get("head_width", 64),
        "vision_mlp_ratio": vision.get("mlp_ratio", 4.0),
        "attentional_pool": POOLS[vision.get("attentional_pool", False)],
        "pooler_queries": vision.get("attn_pooler_queries", 256),
        "pooler_heads": vision.get("attn_pooler_heads", 8),
        "text_width": text["width"],
        "text_layers": text["layers"],
        "text_heads": text["heads"],
        "decoder_layers": decoder["layers"],
        "decoder_heads": decoder["heads"],
        "mlp_ratio": text.get("mlp_ratio", 4.0),
        "max_text_len": text["context_length"],
        "vocab_size": text["vocab_size"],
        "class_mask": "correct" if text.get("correct_cls_mask") else "legacy",
        "itc_kind": "softmax" if config.get("init_logit_bias") is None else "sigmoid",
    }


def to_open_clip(config: CoCaSettings) -> tuple[dict[str, Any], str]:
    """(open_clip's configuration of a model, its `model_cfg`; what it cannot say, "" where nothing).

    RecipeError for a model that open_clip would load and compute otherwise, or could not build.
    """
    if config.attentional_pool in ("cascade", "parallel"):
        raise RecipeError(
            f"--open_clip: attentional_pool is '{config.attentional_pool}', which open_clip computes otherwise than the paper (its "
            "poolers read normalised tokens, and what they give is not normalised); accepted: single, none"
        )
    if config.mlp_ratio != 4:
        raise RecipeError(f"--open_clip: mlp_ratio is {config.mlp_ratio:g}, and open_clip's decoder has 4 always")
    text = {"context_length": config.max_text_len, "vocab_size": config.vocab_size, "width": config.text_width}
    vision = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.vision_width,
        "layers": config.vision_layers,
        "head_width": config.vision_head_width,
        "mlp_ratio": config.vision_mlp_ratio,
        "attentional_pool": next(theirs for theirs, ours in POOLS.items() if ours == config.attentional_pool),
        "attn_pooler_queries": config.pooler_queries,
        "attn_pooler_heads": config.pooler_heads,
        "output_tokens": True,
    }
    tower = {
        **text,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "mlp_ratio": config.mlp_ratio,
        "embed_cls": True,
        "output_tokens": True,
    }
    decoder = {
        **text,
        "heads": config.decoder_heads,
        "layers": config.decoder_layers,
        "mlp_ratio": config.mlp_ratio,
        "attn_pooler_heads": config.pooler_heads,
    }
    note = ""
    if config.class_mask == "correct":
        note = "its configuration cannot say class_mask 'correct': set model.text.correct_cls_mask = True for text features"
    whole = {
        "embed_dim": config.embed_dim,
        "vision_cfg": vision,
        "text_cfg": tower,
        "multimodal_cfg": decoder,
        "custom_text": True,
    }
    if config.itc_kind == "sigmoid":  # by which open_clip has a bias at all; its value comes with the weights
        whole["init_logit_bias"] = -10.0
    return whole, note


def official(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"state_dict": dict(weights)}
