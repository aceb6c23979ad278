"""BLIP as transformers' own BLIP classes, which load and run without this project.

    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipProcessor

    model, processor = BlipForConditionalGeneration.from_pretrained(FOLDER), BlipProcessor.from_pretrained(FOLDER)

FOLDER is what `python -m vlmo_ds.interop.export` writes: a model that writes captions where the stage trained lm, one that answers
questions where it trained vqa, else one that compares and matches. Where transformers' defaults differ from the reference (vision layer_norm_eps, label_smoothing, heads of
the text stack) the configuration says what the reference has. transformers takes texts as they are: one that is matched, or asked, has
to begin with [ENC], as `input_ids[:, 0] = model.config.text_config.vocab_size - 1` makes it; and its generate lets an answer look
at the padding of its question, so that questions are to be asked one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerBase,
)

from vlmo_ds.blocks.vit import EPS as VISION_EPS
from vlmo_ds.config import RecipeError
from vlmo_ds.families.blip.config import PIXELS, BLIPSettings
from vlmo_ds.families.blip.text import EPS as TEXT_EPS
from vlmo_ds.families.blip.weights import official
from vlmo_ds.families.huggingface import appearing

# name here -> name there, of the image tower
VISION = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm(\d)\.(\w+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(\w+)\.(\w+)", r"vision_model.encoder.layers.\1.mlp.\2.\3"),
)


def their_names(weights: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The weights under transformers' names, those that are wanted. RecipeError where one is missing."""
    (found,) = official(weights).values()
    for name, value in weights.items():
        for ours, theirs in VISION:
            if re.fullmatch(ours, name):
                found[re.sub(ours, theirs, name)] = value
    if missing := [name for name in wanted if name not in found]:
        raise RecipeError(f"the weights have no {missing[0]}")
    return {name: found[name] for name in wanted}


def configuration(settings: BLIPSettings, end: int, padding: int) -> BlipConfig:
    text = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.text_width,
        "encoder_hidden_size": settings.vision_width,
        "intermediate_size": settings.text_hidden,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": settings.text_heads,
        "max_position_embeddings": settings.positions,
        "layer_norm_eps": TEXT_EPS,
        "hidden_dropout_prob": settings.text_dropout,
        "attention_probs_dropout_prob": settings.text_dropout,
        "bos_token_id": settings.decode_word,
        "eos_token_id": end,
        "sep_token_id": end,
        "pad_token_id": padding,
        "label_smoothing": settings.label_smoothing,
        "is_decoder": True,
    }
    vision = {
        "hidden_size": settings.vision_width,
        "intermediate_size": 4 * settings.vision_width,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": settings.vision_heads,
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "layer_norm_eps": VISION_EPS,
    }
    return BlipConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=settings.embed_dim,
        image_text_hidden_size=settings.embed_dim,
        label_smoothing=settings.label_smoothing,
    )


def exported(
    weights: Mapping[str, Tensor],
    settings: BLIPSettings,
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str] | None,
    folder: Path,
) -> Any:
    """Writes the folder in one rename. RecipeError for models that transformers has no class of."""
    kind = BlipForImageTextRetrieval
    if "lm" in tasks:
        kind = BlipForConditionalGeneration
    elif "vqa" in tasks:
        kind = BlipForQuestionAnswering
        if settings.vision_width != settings.text_width:
            raise RecipeError(
                f"transformers has models that answer questions only where images are as wide as texts, and vision_width is "
                f"{settings.vision_width}, text_width {settings.text_width}; accepted: --official"
            )
    elif "nlvr2" in tasks:
        raise RecipeError("transformers has no BLIP for pairs of images; accepted: --official")
    end, padding = tokenizer("")["input_ids"][-1], tokenizer.pad_token_id
    config = configuration(settings, end, padding)
    model = kind(config).eval()
    state = model.state_dict()
    own = [name for name, value in state.items() if value.is_floating_point()]
    with torch.no_grad():
        for name, value in their_names(weights, own).items():
            state[name].copy_(value.reshape(state[name].shape))
    size = {"height": settings.image_size, "width": settings.image_size}
    images = BlipImageProcessor(size=size, image_mean=PIXELS.mean, image_std=PIXELS.std)
    with appearing(folder) as temporary:
        model.save_pretrained(temporary)
        BlipProcessor(images, tokenizer).save_pretrained(temporary)
    return model
