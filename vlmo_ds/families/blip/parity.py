"""BLIP's recorded numbers: features, soft targets, logits, losses, gradients, the teacher and the queue afterwards (blip-golden-1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vlmo_ds.families.blip.base import begun_with
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.families.blip.model import BLIP
from vlmo_ds.families.blip.weights import without_second_names
from vlmo_ds.families.comparing import BARS, relative_difference
from vlmo_ds.families.interface import Check
from vlmo_ds.objectives.momentum import similarities, soft_targets

TASKS = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
LOSSES = {"itc": "ita", "itm": "itm", "lm": "lm"}  # the reference's names


def build(golden: dict, dtype: torch.dtype) -> BLIP:
    vision, text, config = golden["config"]["vision"], golden["config"]["text"], golden["config"]
    settings = BLIPSettings(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["embed_dim"],
        vision_layers=vision["depth"],
        vision_heads=vision["heads"],
        text_width=text["hidden_size"],
        text_hidden=text["intermediate_size"],
        text_heads=text["heads"],
        text_layers=text["layers"],
        vocab_size=text["vocab_size"],
        positions=text["max_position_embeddings"],
        max_text_len=text["max_position_embeddings"],
        embed_dim=config["embed_dim"],
        queue_size=config["queue_size"],
        queue_init="random",
        momentum=config["momentum"],
        alpha=config["alpha"],
        label_smoothing=config["label_smoothing"],
    )
    if (settings.decode_word, settings.encode_word) != (config["bos_token_id"], config["enc_token_id"]):
        raise SystemExit("the file's [DEC] and [ENC] are not the last two words of its vocabulary")
    model = BLIP(settings, TASKS).to(dtype)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in golden["state_dict"].items()
    }
    model.load_state_dict({**without_second_names(state)[0], "idx_queue": model.idx_queue})
    return model


def compare(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative difference, bar)."""
    bar, gradient_bar = BARS[dtype]
    model, recorded = build(golden, dtype), golden["outputs"]
    ids, masks = golden["batch"]["text_ids"], golden["batch"]["text_masks"]
    rows = torch.arange(len(ids))
    batch = {
        "image": golden["batch"]["image"].to(dtype),
        "text_ids": ids,
        "text_masks": masks,
        "image_id": rows,
        "sample_id": rows,
    }
    batch |= {name: golden[name] for name in ("negative_image_index", "negative_text_index")}
    model.follow()
    batch |= model.keys_of_step([model.keys(batch)])
    for name, value in features(model, batch).items():
        wanted = recorded[name]
        if name == "lm_logits":
            wanted = wanted[:, :-1][masks[:, 1:].bool()]
        yield name, relative_difference(value, wanted), bar
    losses = model(batch).losses
    for task, name in LOSSES.items():
        yield f"losses.{task}", relative_difference(losses[task], golden["losses"][name]), bar
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for task, of_task in LOSSES.items():
        found = torch.autograd.grad(losses[task], list(trained.values()), retain_graph=True, allow_unused=True)
        gradients = dict(zip(trained, found, strict=True))
        wanted = without_second_names(golden["grads"][of_task])[0]
        for name, gradient in gradients.items():
            if name in wanted:
                difference = float("inf") if gradient is None else relative_difference(gradient, wanted[name])
                if name.endswith("key.bias") and gradient is not None:
                    # a bias of keys moves all scores of a query alike, so its gradient is zero: recorded is what rounding left
                    scale = wanted[name.replace(".bias", ".weight")].double().norm()
                    difference = float((gradient - wanted[name]).double().norm() / scale)
                yield f"grads.{task}.{name}", difference, gradient_bar
            elif gradient is not None and bool(gradient.ne(0).any()):
                yield f"grads.{task}.{name} (recorded: none)", float("inf"), gradient_bar
        for name in wanted.keys() - gradients.keys():
            yield f"grads.{task}.{name} (the model has no such parameter)", float("inf"), gradient_bar
    model.push(batch)
    state = model.state_dict()
    for name, value in without_second_names(golden["after_step"])[0].items():
        difference = relative_difference(state[name], value) if name in state else float("inf")
        yield f"after_step.{name}", difference, bar


@torch.no_grad()
def features(model: BLIP, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the reference computes on its way to the losses."""
    found: dict[str, Tensor] = {}
    found["image_embeds"] = image_BSD = model.visual_encoder(model.pixels(batch["image"]))
    found["image_feat"], found["text_feat"] = model.encode_image(batch)["image"], model.encode_text(batch)["text"]
    found["image_feat_m"], found["text_feat_m"] = batch["keys_image"][0], batch["keys_text"][0]
    keys, temperature = model.all_keys(batch), model.temperature()
    for name, query, teacher, key in (
        ("sim_i2t", found["image_feat"], found["image_feat_m"], keys.text),
        ("sim_t2i", found["text_feat"], found["text_feat_m"], keys.image),
    ):
        found[name] = similarities(query, key, keys, temperature)
        found[f"{name}_targets"] = soft_targets(teacher, key, keys, batch["image_id"], temperature, model.config.alpha)
    lengths_B, words = batch["text_masks"].sum(1), model.config
    wrong_image, wrong_text = batch["negative_image_index"], batch["negative_text_index"]
    matched = [(batch["text_ids"], lengths_B, image_BSD)]
    matched.append((batch["text_ids"], lengths_B, image_BSD[wrong_image]))
    matched.append((batch["text_ids"][wrong_text], lengths_B[wrong_text], image_BSD))
    found["itm_logits"] = torch.cat([model.matched(begun_with(words.encode_word, t), n, i) for t, n, i in matched])
    found["lm_logits"] = model.written(batch["text_ids"], lengths_B, image_BSD)
    return found


FORMATS: Mapping[str, Check] = {"blip-golden-1": compare}
