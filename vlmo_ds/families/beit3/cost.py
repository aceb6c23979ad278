"""What BEiT-3's step costs: operations, memory, bytes on the wire, walks of the stack. For `plan`; texts count as long as they may be."""

from __future__ import annotations

import math
from typing import NamedTuple

from vlmo_ds.config import StageConfig
from vlmo_ds.families.beit3.config import BEiT3Settings
from vlmo_ds.families.beit3.model import LAST_QUERIES, BEiT3
from vlmo_ds.families.cost import contrast_memory, contrast_wire
from vlmo_ds.families.interface import Load, matches
from vlmo_ds.objectives.captioning import CHUNK


class Sequences(NamedTuple):
    """Of one sample."""

    times: float
    image: int  # image tokens of each
    text: int  # text tokens of each
    read: float  # tokens of each that come out of the last block

    @property
    def length(self) -> int:
        return self.image + self.text


def masked(config: BEiT3Settings, stage: StageConfig) -> tuple[float, float]:
    """(patches of an image, words of a text) that are predicted."""
    words = config.caption_mask if "captioning" in stage.tasks else stage.data.mlm_probability
    return stage.data.mim_ratio * config.patches, words * config.max_text_len


def sequences(config: BEiT3Settings, stage: StageConfig) -> list[Sequences]:
    image, text = config.patches + 1, config.max_text_len
    patches, words = masked(config, stage)
    questions = stage.data.questions_per_image
    two = config.pair_views == "two"
    contrast = [Sequences(1, image, 0, 1), Sequences(1, 0, text, 1)]
    of_task = {
        "mim": [Sequences(1, image, 0, patches)],
        "textmlm": [Sequences(1, 0, text, words)],
        "mvlm": [Sequences(1 + two, image, text, (patches + words) / (1 + two))],
        "itc": contrast,
        "irtr": contrast,
        "itm": [Sequences(3, image, text, 1)],  # matched and the two kinds of wrong pairs
        "vqa": [Sequences(questions, image, text, 1)],
        "nlvr2": [Sequences(2, image, text, 2)],
        "captioning": [Sequences(1, image, text, words)],
        "classification": [Sequences(1, image, 0, image)],
    }
    return [one for task in stage.tasks for one in of_task[task]]


def images(stage: StageConfig) -> int:
    """Of a sample, those that are cut into patches."""
    tasks = stage.tasks.keys()
    return ("mim" in tasks) + bool(tasks - {"mim", "textmlm"}) + 2 * ("itm" in tasks) + ("nlvr2" in tasks)


def predicted(config: BEiT3Settings, stage: StageConfig) -> tuple[float, float]:
    """(visual tokens, words) of a sample that are predicted."""
    patches, words = masked(config, stage)
    of_images, of_texts = ({"mim", "mvlm"}, {"textmlm", "mvlm", "captioning"})
    return patches * len(of_images & stage.tasks.keys()), words * len(of_texts & stage.tasks.keys())


def forward_flops(config: BEiT3Settings, stage: StageConfig, samples: float = 1.0) -> float:
    """Multiply-adds times two of the forward pass: linear layers, attention products, patches, heads. Of the last block what is not read
    does not count. samples: of the stage's `data`; its streams have theirs in proportion."""
    whole = stage.global_batch_size
    return sum(flops(config, part) * samples * part.global_batch_size / whole for part in stage.parts.values())


def flops(config: BEiT3Settings, stage: StageConfig) -> float:
    """Of one sample of a stream."""
    d, tasks = config.embed_dim, stage.tasks
    total: float = images(stage) * 2 * config.patches * 3 * config.patch_size**2 * d
    for times, image, text, read in sequences(config, stage):
        length = image + text
        block, last = (
            (4 * length + (4 + 4 * config.mlp_ratio) * on) * d**2 + 4 * on * length * d for on in (length, read)
        )
        total += times * ((config.depth - 1) * block + last)
    tokens, words = predicted(config, stage)
    total += 2 * d * (tokens * config.num_visual_tokens + words * config.vocab_size)
    total += ("classification" in tasks) * 2 * d * config.num_classes
    total += (len({"itc", "irtr"} & tasks.keys()) * 4 + ("itm" in tasks) * 6 + ("nlvr2" in tasks) * 16) * d**2
    return total + ("vqa" in tasks) * stage.data.questions_per_image * (6 * d**2 + 4 * d * config.vqav2_label_size)


def activations(config: BEiT3Settings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Estimates of what the forward pass leaves for the backward pass (11 tensors of width D per token and block, 4 of them of a hidden
    layer; where nothing is recomputed 22), of a chunk of logits, contrastive features and what the exchange of negatives holds."""
    d, b, every = config.embed_dim, load.bytes, config.recompute_every
    share = 1 - (math.ceil(config.depth / every) / config.depth if every else 0)  # of blocks that keep everything
    kept = 10 + 3 * config.mlp_ratio if config.recompute == "none" else 7 + config.mlp_ratio
    inputs = 0 if load.offloaded else 1
    tokens = logits = 0.0
    for part in stage.parts.values():
        micro = load.micro * part.global_batch_size / stage.global_batch_size
        tokens += micro * sum(one.times * one.length for one in sequences(config, part))
        of_images, of_texts = (min(CHUNK, micro * count) for count in predicted(config, part))
        logits = max(logits, 3.0 * 4 * max(of_images * config.num_visual_tokens, of_texts * config.vocab_size))
    kept_of_blocks = tokens * d * b * (config.depth * (share * kept + (1 - share) * inputs) + 3)
    features = collector = 0.0
    if {"itc", "irtr"} & stage.tasks.keys():
        features, chunk = contrast_memory(2, d, stage, load)
        logits += chunk
    if "itm" in stage.tasks:
        collector = 3 * load.micro * row_bytes(config)  # sent, received, sorted
    return {"activations": kept_of_blocks, "logits": logits, "features": features, "collector": collector}


def row_bytes(config: BEiT3Settings) -> int:
    """What travels for a sample's wrong image and wrong text: pixels, word ids, mask."""
    return 3 * config.image_size**2 + 2 * 8 * config.max_text_len


def collectives(config: BEiT3Settings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step for contrastive features, their gradients, and mined negatives."""
    micro, ranks, times = load.micro, load.ranks, load.accumulation
    wire = dict.fromkeys(("all-gather", "reduce-scatter", "all-to-all"), 0.0)
    if {"itc", "irtr"} & stage.tasks.keys():
        features = contrast_wire(2, config.embed_dim, load)
        wire["all-gather"] += features
        wire["reduce-scatter"] += features
    if "itm" in stage.tasks:
        wire["all-gather"] += (ranks - 1) * 5 * 8 * micro * times  # two ids and three wanted rows a sample
        others = (micro * ranks - micro) / max(micro * ranks - 1, 1)  # share of the other samples that are elsewhere
        wire["all-to-all"] = others * micro * row_bytes(config) * times
    return wire


def walks(model: BEiT3, stage: StageConfig) -> dict[str, int]:
    """How often a forward pass enters the module that holds a parameter: twice where the mined pairs pass as well."""
    idle = model.idle()
    times = {name: int(not matches(name, idle)) for name, _ in model.named_parameters()}
    if "itm" in stage.tasks:  # whose pairs are read for their images' class tokens
        last = f"beit3.encoder.layers.{model.config.depth - 1}."
        once = (*(f"{last}{part}.B." for part in LAST_QUERIES), "beit3.encoder.layer_norm.B.")
        for name in times:
            if name.startswith("beit3.") and not name.startswith(once):
                times[name] *= 2
    return times
