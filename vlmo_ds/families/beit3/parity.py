"""BEiT-3's recorded numbers: encodings, features, logits, losses, gradients, captions (beit3-golden-1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vlmo_ds.families.beit3.backbone import Encoded, Stream
from vlmo_ds.families.beit3.config import BEiT3Settings
from vlmo_ds.families.beit3.model import BEiT3
from vlmo_ds.families.comparing import BARS, relative_difference
from vlmo_ds.families.interface import Check
from vlmo_ds.objectives.mlm import IGNORE

# the file's task -> the project's
TASKS = {"retrieval": "irtr", **{task: task for task in ("captioning", "vqa", "nlvr2", "classification")}}


def build(golden: dict, task: str, dtype: torch.dtype) -> BEiT3:
    """The model of the file's config with the file's weights; each side has all of the other's."""
    config = golden["config"]
    settings = {k: v for k, v in config.items() if k in BEiT3Settings.model_fields}
    settings |= {"max_text_len": config["text_len"], "mask_word": config["vocab_size"] - 1}
    settings |= {"vqav2_label_size": config["num_answers"], "num_classes": config["num_classes"]}
    if task == "classification":  # recorded without smoothing
        settings["label_smoothing"] = 0.0
    model = BEiT3(BEiT3Settings(**settings), {TASKS[task]: 1.0}).to(dtype).eval()
    model.load_state_dict(golden["state_dict"][task])
    return model


def step_inputs(golden: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    recorded = golden["batch"]
    ids, rows = recorded["text_ids"], torch.arange(len(recorded["text_ids"]))
    return {
        "text_ids": ids,
        "text_masks": (~recorded["text_padding"]).long(),
        "text_ids_mlm": recorded["text_ids_mlm"],
        "text_labels_mlm": ids.masked_fill(~recorded["text_masked"], IGNORE),
        "image": recorded["image"].to(dtype),
        "image_0": recorded["image"].to(dtype),
        "image_1": recorded["image_2"].to(dtype),
        "image_mask": recorded["image_mask"],
        "vqa_targets": recorded["vqa_targets"],
        "answers": recorded["nlvr2_labels"],
        "label": recorded["class_labels"],
        "image_id": rows,
        "sample_id": rows,
    }


def encodings(model: BEiT3, batch: Mapping[str, Tensor]) -> dict[str, Encoded]:
    """Every recorded encoding, from one walk of the stack."""
    rows, mask, hidden = torch.arange(len(batch["image"])), batch["text_masks"], batch["image_mask"]
    streams = {
        "text": Stream(None, None, batch["text_ids"], mask),
        "image": Stream(rows),
        "image_masked": Stream(rows, hidden),
        "pair": Stream(rows, None, batch["text_ids"], mask),
        "pair_image_masked": Stream(rows, hidden, batch["text_ids"], mask),
        "pair_text_masked": Stream(rows, None, batch["text_ids_mlm"], mask),
        "text_masked": Stream(None, None, batch["text_ids_mlm"], mask),
    }
    return model.encode(streams, batch["image"])


def compare(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative difference, bar)."""
    bar, _ = BARS[dtype]
    batch = step_inputs(golden, dtype)
    valid = batch["text_masks"].bool()
    with torch.no_grad():
        found = encodings(build(golden, "retrieval", dtype), batch)
    for name, encoded in found.items():
        recorded, images = golden["outputs"][name], 0
        if encoded.image is not None:
            images = encoded.image.shape[1]
            yield f"{name}.image", relative_difference(encoded.image, recorded[:, :images]), bar
        if encoded.text is not None:  # encodings of padding are meaningless
            yield f"{name}.text", relative_difference(encoded.text[valid], recorded[:, images:][valid]), bar
    for task in TASKS:
        yield from compare_task(golden, build(golden, task, dtype), batch, task, dtype)


def compare_task(
    golden: dict, model: BEiT3, batch: Mapping[str, Tensor], task: str, dtype: torch.dtype
) -> Iterator[tuple[str, float, float]]:
    """A task's features or logits, loss and gradients."""
    bar, gradient_bar = BARS[dtype]
    with torch.no_grad():
        found = outputs(golden, model, batch, task)
    wanted = {name for name in golden["outputs"] if name.startswith(f"{task}.")}
    for name in sorted(wanted | found.keys()):
        difference = float("inf")
        if name in wanted and name in found:
            difference = relative_difference(found[name], golden["outputs"][name])
        yield name, difference, bar
    loss = model(batch).loss
    yield f"losses.{task}", relative_difference(loss, golden["losses"][task]), bar
    loss.backward()
    recorded = golden["grads"][task]
    for name, parameter in model.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name in recorded:
            yield f"grads.{task}.{name}", gradient_difference(name, ours, recorded), gradient_bar
        elif bool(ours.ne(0).any()):
            yield f"grads.{task}.{name} (recorded: none)", float("inf"), gradient_bar
    for name in recorded.keys() - dict(model.named_parameters()).keys():
        yield f"grads.{task}.{name} (the model has no such parameter)", float("inf"), gradient_bar


def gradient_difference(name: str, ours: Tensor, recorded: Mapping[str, Tensor]) -> float:
    if "k_proj" in name and name.endswith("bias"):
        # a bias of keys moves all scores of a query alike, so its gradient is zero: recorded is what rounding left
        scale = recorded[name.replace(".bias", ".weight")].double().norm()
        return float((ours - recorded[name]).double().norm() / scale)
    return relative_difference(ours, recorded[name])


def outputs(golden: dict, model: BEiT3, batch: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """What is recorded of a task, by its name there."""
    if task == "retrieval":
        image, text = model(batch, "encode_image")["image"], model(batch, "encode_text")["text"]
        return {"retrieval.image_features": image, "retrieval.text_features": text}
    if task == "captioning":
        hidden: list[Tensor] = []
        hook = model.mlm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        model(batch)
        hook.remove()
        words = golden["outputs"]["captioning.greedy"]
        return {"captioning.logits": model.mlm_head(hidden[0])} | written(model, batch, words)
    call = {"vqa": "answer", "nlvr2": "compare", "classification": "classify"}[task]
    return {f"{task}.logits": model(batch, call)}


class GrownCache:
    """Keys and values by layer (blocks.cache.Cache)."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            key, value = (torch.cat(both, dim=2) for both in zip(self.kept[layer], (key, value), strict=True))
        self.kept[layer] = key, value
        return key, value


def written(model: BEiT3, batch: Mapping[str, Tensor], words_BL: Tensor) -> dict[str, Tensor]:
    """The logits before each of the recorded words but the first, and the most likely words."""
    memory, cache = model(batch, "caption_image"), GrownCache()
    logits = []
    for first in range(words_BL.shape[1] - 1):
        newest = {"text_ids": words_BL[:, first : first + 1], "first": first, "memory": memory, "cache": cache}
        logits.append(model(newest, "caption_step"))
    found = torch.stack(logits, dim=1)
    return {
        "captioning.greedy_logits": found,
        "captioning.greedy": torch.cat((words_BL[:, :1], found.argmax(2)), dim=1),
    }


FORMATS: Mapping[str, Check] = {"beit3-golden-1": compare}
