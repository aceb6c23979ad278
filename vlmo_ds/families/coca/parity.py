"""CoCa's recorded numbers: features, logits, losses and gradients (coca-golden-1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vlmo_ds.blocks.layers import unit
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.model import CoCa, next_words
from vlmo_ds.families.coca.weights import from_open_clip
from vlmo_ds.families.comparing import BARS, relative_difference
from vlmo_ds.families.interface import Check

TASKS = {"itc": 1.0, "caption": 2.0}


def compare(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative difference, bar)."""
    bar, gradient_bar = BARS[dtype]
    model = CoCa(CoCaSettings(**from_open_clip(golden["config"])), TASKS).to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in golden["state_dict"].items()})
    ids = golden["batch"]["text"]
    batch = {"image": golden["batch"]["image"].to(dtype), "text_ids": ids, "text_masks": (ids != 0).long()}
    recorded = golden["outputs"]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        image, found["image_embs"] = model.visual(batch["image"])
        lengths = batch["text_masks"].sum(1)
        text = model.text(ids, lengths)
        found["image_features"], found["text_features"] = unit(image), unit(text.feature)
        found["token_embs"] = text.tokens_ND
        x_ND, fold, labels = next_words(ids, lengths, text)
        found["logits"] = (
            model.text_decoder.hidden(x_ND, fold, found["image_embs"]) @ model.text_decoder.text_projection
        )
        found["logit_scale"] = model.logit_scale.exp()
    valid = ids != 0
    wanted = dict(recorded)
    wanted["token_embs"] = recorded["token_embs"][valid]  # features at padded positions are meaningless
    wanted["logits"] = recorded["logits"][valid[:, 1:]]
    for name, value in found.items():
        yield name, relative_difference(value, wanted[name]), bar
    yield "labels", relative_difference(labels, recorded["labels"][valid[:, 1:]]), bar
    out = model(batch)
    yield "losses.itc", relative_difference(out.losses["itc"], golden["losses"]["contrastive_loss"]), bar
    yield "losses.caption (weight 2)", relative_difference(out.losses["caption"], golden["losses"]["caption_loss"]), bar
    yield "total", relative_difference(out.loss, golden["total"]), bar
    out.loss.backward()
    for name, parameter in model.named_parameters():
        gradient = golden["grads"].get(name)
        if gradient is not None:
            ours = parameter.grad
            yield f"grads.{name}", float("inf") if ours is None else relative_difference(ours, gradient), gradient_bar
        elif parameter.grad is not None and bool(parameter.grad.ne(0).any()):
            yield f"grads.{name} (recorded: none)", float("inf"), gradient_bar


FORMATS: Mapping[str, Check] = {"coca-golden-1": compare}
