"""Weights of other origins for BLIP: the reference's files, a ViT and BERT to begin with, another image size."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlmo_ds.blocks.resample import resize_absolute
from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.families.blip.base import BLIPModel
from vlmo_ds.families.blip.config import WORDS, BLIPSettings
from vlmo_ds.families.blip.model import student_of
from vlmo_ds.families.interface import matches

IMAGE_POSITIONS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
QUEUE = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
# What the text decoder shares with the text encoder, by the names behind the prefixes that the reference has for each, and with
# the word table: name there -> name here.
SHARED = re.compile(r"(?:embeddings|encoder\.layer\.\d+\.(?:crossattention|intermediate|output))\..+")
ENCODER, DECODER = "text_encoder.", "text_decoder.bert."
OF_WORDS = {
    "text_decoder.cls.predictions.decoder.weight": "text_encoder.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


SECOND_TABLE = "text_decoder.bert.embeddings.word_embeddings.weight"  # of a decoder that shares nothing
OF_VIT = re.compile(r"(cls_token|pos_embed)$|(patch_embed|blocks|norm)\.")
OF_CLASSES = ("head.", "head_dist.", "pre_logits.", "fc_norm.")
OF_BERT = re.compile(r"bert\.|(embeddings|encoder|pooler)\.|cls\.")
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # in BERT's first releases
ONE_IMAGE = re.compile(r"text_encoder\.encoder\.layer\.\d+\.crossattention\.(self|output\.dense)\..+")


def shared_name(name: str) -> str | None:
    """The name here of a tensor that the reference has under two names; None for the others."""
    part = name.removeprefix(DECODER)
    return ENCODER + part if name.startswith(DECODER) and SHARED.fullmatch(part) else OF_WORDS.get(name)


def without_second_names(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(the tensors under one name each, how many second names there were). RecipeError where the two of a pair differ."""
    source = {name: value for name, value in source.items() if not name.endswith("position_ids")}
    found = {name: value for name, value in source.items() if not shared_name(name)}
    left_out = 0
    for name, value in source.items():
        if ours := shared_name(name):
            if not torch.equal(found.setdefault(ours, value), value):
                raise RecipeError(f"{name} and {ours} are one tensor in BLIP, and differ in this file")
            left_out += 1
    return found, left_out


def from_vit(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors with those of a ViT (timm's names, as DeiT's files have) as the image tower's, what was changed)."""
    if "patch_embed.proj.weight" not in source:
        return dict(source), []
    left_out = [name for name in source if name.startswith(OF_CLASSES)]
    found = {
        f"visual_encoder.{name}" if OF_VIT.match(name) else name: value
        for name, value in source.items()
        if name not in left_out
    }
    return found, [f"ViT: the image tower's; left out: {', '.join(left_out) or 'nothing'}"]


def from_bert(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors with those of BERT as the text stack's, what was changed): self-attention that reads and that writes begins as
    BERT's, and so does the head of words. BERT's first token type, which it adds to every word, goes into the positions; the
    words of the model's own ([DEC], [ENC]) start fresh."""
    if not any(OF_BERT.match(name) for name in source):
        return dict(source), []
    found = {name: value for name, value in source.items() if not OF_BERT.match(name)}
    bert = {}
    for name, value in source.items():
        if OF_BERT.match(name):
            bert[re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: OLD_NAMES[old[0]], name.removeprefix("bert."))] = value
    types = bert.pop("embeddings.token_type_embeddings.weight", None)
    positions = "embeddings.position_embeddings.weight"
    if types is not None and positions in bert:
        bert[positions] = bert[positions] + types[0]
    if positions in bert and ENCODER + positions in own:
        bert[positions] = bert[positions][: len(own[ENCODER + positions])]
    for name, value in bert.items():
        if name.startswith(("embeddings.", "encoder.")):
            found[ENCODER + name] = value
            if DECODER + name in own:
                found[DECODER + name] = value
        elif f"text_decoder.{name}" in own:
            found[f"text_decoder.{name}"] = value
    fresh = 0
    for name in WORDS:
        if name in found and name in own and len(found[name]) < len(own[name]):
            fresh = len(own[name]) - len(found[name])
            found[name] = torch.cat((found[name], own[name][-fresh:].to(found[name].dtype)))
    return found, [f"BERT: {len(bert)} tensors, the text stack's; {fresh} words of the vocabulary start fresh"]


def with_own_decoder(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors for a model whose decoder shares nothing with the encoder, what was changed): what the source has once is there
    twice, and a tensor of another shape (keys and values of images that are wider than texts) starts fresh."""
    found = {name: value for name, value in source.items() if not name.endswith("position_ids")}
    for name in OF_WORDS:
        value = found.pop(name, None)
        ours = SECOND_TABLE if name.endswith("weight") else OF_WORDS[name]
        if value is not None and not torch.equal(found.setdefault(ours, value), value):
            raise RecipeError(f"{name} and {ours} are one tensor in BLIP, and differ in this file")
    copied = [name for name in own if name not in found and shared_name(name) in found]
    found |= {name: found[str(shared_name(name))] for name in copied}
    fresh = [name for name in own if shared_name(name) and name in found and found[name].shape != own[name].shape]
    fresh = [name for name in fresh if "crossattention.self" in name]
    found |= {name: own[name] for name in fresh}
    changed = (
        [f"the decoder begins as the encoder where it has no weights there ({len(copied)} tensors)"] if copied else []
    )
    if fresh:
        changed.append(f"{len(fresh)} of the decoder start fresh: it looks at texts, where {fresh[0]} looked at images")
    return found, changed


def for_two_images(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors for a model with two cross-attentions in a layer, what was changed): both begin as the source's one."""
    found, _ = without_second_names(source)
    copied = 0
    for name in own:
        one = re.sub(r"(crossattention\.)(self|output\.dense)[01]\.", r"\1\2.", name)
        if one != name and name not in found and one in found:
            found[name] = found[one]
            copied += 1
    found = {name: value for name, value in found.items() if name in own or not ONE_IMAGE.fullmatch(name)}
    return found, [f"both cross-attentions of a layer begin as the source's one ({copied} tensors)"] if copied else []


def convert(
    source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: BLIPSettings, init: InitConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(source under the names of this project with positions of the model's shapes, what was changed). own: the model's state dict."""
    source, begun_with_vit = from_vit(source)
    source, begun_with_bert = from_bert(source, own)
    if SECOND_TABLE in own:
        fitted, changed = with_own_decoder(source, own)
    elif any("crossattention.self0." in name for name in own):
        fitted, changed = for_two_images(source, own)
    else:
        fitted, left_out = without_second_names(source)
        changed = [f"{left_out} second names of shared tensors left out"] if left_out else []
    changed = [*begun_with_vit, *begun_with_bert, *changed]
    for name in IMAGE_POSITIONS:
        if name in fitted and name in own and fitted[name].shape != own[name].shape:
            value = resize_absolute(fitted[name], own[name].shape[1])
            changed.append(f"{name} {list(fitted[name].shape)} -> {list(value.shape)}: bicubic")
            fitted[name] = value
    if "temp" in fitted and fitted["temp"].dim():
        fitted["temp"] = fitted["temp"].reshape(())
    changed += fit_teacher(fitted, own, init)
    return fitted, changed


def fit_teacher(fitted: dict[str, Tensor], own: Mapping[str, Tensor], init: InitConfig) -> list[str]:
    """A teacher begins as its student where a file has none, and its queue empty where the file's is of another size; a model
    without them leaves both out. What was changed."""
    changed, teacher = [], [name for name in own if student_of(name)]
    anew = [name for name in teacher if matches(str(student_of(name)), init.fresh)]  # their students are not the file's
    for name in anew:
        fitted.pop(name, None)
    if given := [name for name in fitted if (student_of(name) or name in QUEUE) and name not in own]:
        for name in given:
            del fitted[name]
        changed.append(f"the teacher and its queue ({len(given)} tensors) left out, which the stage's tasks do not use")
    if begun := [name for name in teacher if name not in fitted]:
        for name in begun:
            student = student_of(name)
            known = student in fitted and not matches(str(student), init.fresh)
            fitted[name] = fitted[str(student)] if known else own[name]
        changed.append(f"the teacher begins as the student ({len(begun)} tensors)")
    if QUEUE[0] in own and (anew or any(name not in fitted or fitted[name].shape != own[name].shape for name in QUEUE)):
        fitted.update({name: own[name] for name in QUEUE})
        changed.append("the queue begins anew")
    return changed


def fresh(init: InitConfig) -> list[str]:
    return []


def finish(model: BLIPModel, init: InitConfig) -> None:
    pass


def official(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """With both names of what the text decoder shares with the text encoder, and the places' numbers; the images of the queue's
    features, which the reference does not keep, are left out."""
    found = {name: value for name, value in weights.items() if name != "idx_queue"}
    table = "embeddings.position_embeddings.weight"
    places = torch.arange(len(weights[ENCODER + table]))[None]
    decodes, prefixes = "text_decoder.cls.predictions.bias" in found, (ENCODER, "text_encoder_m.", DECODER)
    found |= {f"{prefix}embeddings.position_ids": places.clone() for prefix in prefixes if prefix + table in found}
    if decodes and SECOND_TABLE not in found:
        for name, value in list(found.items()):
            part = name.removeprefix(ENCODER)
            if name.startswith(ENCODER) and SHARED.fullmatch(part):
                found[DECODER + part] = value
    if decodes:
        words = "text_decoder.cls.predictions"
        found[f"{words}.decoder.weight"] = found[SECOND_TABLE]
        found[f"{words}.decoder.bias"] = found[f"{words}.bias"]
    return {"model": found}
