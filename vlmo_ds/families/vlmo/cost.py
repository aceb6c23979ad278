"""What VLMo's step costs: operations, memory, bytes on the wire, walks of the block stack. For `plan`."""

from __future__ import annotations

import math
from typing import NamedTuple

from vlmo_ds.config import StageConfig
from vlmo_ds.families.cost import contrast_memory, contrast_wire
from vlmo_ds.families.interface import Load
from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo


class Sequences(NamedTuple):
    """Of one sample."""

    low: float  # how many below the VL experts
    high: float  # and from there on
    length: int
    read: int  # tokens of each that come out of the last block


def masked_patches(config: VLMoSettings, stage: StageConfig) -> int:
    """Of an image."""
    return round(stage.data.mim_ratio * config.patches)


def sequences_of(config: VLMoSettings, stage: StageConfig) -> list[Sequences]:
    text, image = config.max_text_len, config.patches + 1
    seen = config.patches_of_contrast + 1
    tasks = stage.tasks
    found: list[Sequences] = []
    if "mlm" in tasks:
        found.append(Sequences(1, 1, text + image, text))
    if "itm" in tasks:  # matched and the two kinds of wrong pairs
        found.append(Sequences(3, 3, text + image, 1))
    if "itc" in tasks:  # alone, and twice from the VL experts on
        found += [Sequences(1, 2, text, 1), Sequences(1, 2, seen, 1)]
    if "textmlm" in tasks:
        found.append(Sequences(1, 1, text, text))
    if "irtr" in tasks:
        found += [Sequences(1, 1, text, 1), Sequences(1, 1, seen, 1)]
    if "mim" in tasks:
        whole = image - masked_patches(config, stage) * config.mim_visible_only
        found.append(Sequences(1, 1, whole, whole))
    if "vqa" in tasks:
        found.append(Sequences(stage.data.questions_per_image, stage.data.questions_per_image, text + image, 1))
    if "nlvr2" in tasks:
        found.append(Sequences(2, 2, text + image, 1))
    return found


def activations(config: VLMoSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Estimates of what the forward pass leaves for the backward pass (10 tensors of width D per token and block; where nothing is
    recomputed 14 and the attention's probabilities), of logits, contrastive features and what the exchange of negatives holds."""
    micro, b = load.micro, load.bytes
    d, lower = config.embed_dim, config.vlffn_start_layer_index
    upper = config.depth - lower
    every = config.recompute_every
    share = 1 - (math.ceil(config.depth / every) / config.depth if every else 0)  # of blocks that keep everything
    bytes_per_sample = 0.0
    for low, high, length, _ in sequences_of(config, stage):
        rows = (low * lower + high * upper) * length
        inputs = 0 if load.offloaded else d * b
        kept = 14 * d + config.num_heads * length if config.recompute == "none" else 10 * d
        bytes_per_sample += rows * (share * kept * b + (1 - share) * inputs)
        bytes_per_sample += 3 * max(low, high) * length * d * b
    masked = stage.data.mlm_probability * config.max_text_len * micro
    logits = masked * config.vocab_size * (b + 8) if {"mlm", "textmlm"} & stage.tasks.keys() else 0.0
    features = collector = 0.0
    if tables := contrast_tables(stage):
        features, chunk = contrast_memory(tables, d, stage, load)
        logits += chunk
    if "itm" in stage.tasks:
        collector = 3 * micro * row_bytes(config)  # sent, received, sorted
    return {"activations": micro * bytes_per_sample, "logits": logits, "features": features, "collector": collector}


def contrast_tables(stage: StageConfig) -> int:
    """Tables of contrastive features: image and text, in pretraining those of the VL experts as well."""
    return 4 if "itc" in stage.tasks else 2 if "irtr" in stage.tasks else 0


def row_bytes(config: VLMoSettings) -> int:
    """What travels for a sample's wrong image and wrong text: pixels, word ids, mask."""
    return 3 * config.image_size**2 + 2 * 8 * config.max_text_len


def collectives(config: VLMoSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step for contrastive features, their gradients, and mined negatives."""
    micro, ranks, times = load.micro, load.ranks, load.accumulation
    away = (ranks - 1) / ranks
    wire = dict.fromkeys(("all-gather", "reduce-scatter", "all-to-all"), 0.0)
    if tables := contrast_tables(stage):
        features = contrast_wire(tables, config.embed_dim, load)
        wire["all-gather"] += features
        wire["reduce-scatter"] += features
    if "itm" in stage.tasks:
        wire["all-gather"] += away * 5 * 8 * micro * ranks * times  # two ids and three wanted rows a sample
        others = (micro * ranks - micro) / max(micro * ranks - 1, 1)  # share of the other samples that are elsewhere
        wire["all-to-all"] = others * micro * row_bytes(config) * times
    return wire


def walks(model: VLMo, stage: StageConfig) -> dict[str, int]:
    """How often a forward pass enters the module that holds a parameter: twice where the mined pairs pass as well."""
    tasks, start, depth = stage.tasks.keys(), model.config.vlffn_start_layer_index, model.config.depth
    parts = [f"{part}_{kind}." for part in ("mlp", "norm2") for kind in ("text", "imag")]
    upper = tuple(f"transformer.blocks.{i}.{part}" for i in range(start, depth) for part in parts)
    idle = [] if {"itm", "vqa", "nlvr2"} & tasks else ["pooler."]
    if "mim" in tasks:
        idle += ["text_embeddings.", "_text.", "_vl."]
    elif "textmlm" in tasks:
        idle += ["patch_embed.", "_imag.", "_vl."]
    elif "irtr" in tasks:
        idle += ["_vl."]
    elif "itc" not in tasks:  # joint sequences take the VL experts in the upper layers
        idle += upper
    found = {}
    for name, _ in model.named_parameters():
        twice = "itm" in tasks and name.startswith("transformer.") and not name.startswith(upper)
        found[name] = 0 if any(part in name for part in idle) else 2 if twice else 1
    return found


def forward_flops(config: VLMoSettings, stage: StageConfig, samples: float = 1.0) -> float:
    """Multiply-adds times two of the forward pass: linear layers, attention products, patches, heads. Of the last block what is not read
    does not count."""
    d, patches = config.embed_dim, config.patches
    lower, tasks = config.vlffn_start_layer_index, stage.tasks
    total = 0.0
    for low, high, length, read in sequences_of(config, stage):
        block, last = (
            (4 * length + (4 + 4 * config.mlp_ratio) * on) * d**2 + 4 * on * length * d for on in (length, read)
        )
        total += (low * lower + high * (config.depth - lower)) * block
        total += (high if lower < config.depth else low) * (last - block)
    images = (tasks.keys() != {"textmlm"}) + 2 * ("itm" in tasks)  # the second walk's matched and wrong images
    images += "nlvr2" in tasks
    total += images * 2 * patches * 3 * config.patch_size**2 * d
    total += contrast_tables(stage) * 2 * d**2 + ("itm" in tasks) * 3 * (2 * d**2 + 4 * d)
    questions = ("vqa" in tasks) * stage.data.questions_per_image
    total += questions * (6 * d**2 + 4 * d * config.vqav2_label_size) + ("nlvr2" in tasks) * 12 * d**2
    if {"mlm", "textmlm"} & tasks.keys():
        total += stage.data.mlm_probability * config.max_text_len * (2 * d**2 + 2 * d * config.vocab_size)
    if "mim" in tasks:
        masked, patch = masked_patches(config, stage), 3 * config.patch_size**2
        total += masked * 2 * d * (config.num_visual_tokens if config.mim_target == "tokens" else patch)
        if config.mim_early_layer:  # the patch aggregation's blocks, and its predictions
            image = patches + 1
            block = (8 + 4 * config.mlp_ratio) * image * d**2 + 4 * image**2 * d
            total += config.mim_head_layers * block + masked * 2 * d * config.num_visual_tokens
        if config.mim_visible_only:
            seen = patches + 1 - masked
            total += (masked * (4 + 4 * config.mlp_ratio) + seen * 4) * d**2 + 4 * masked * seen * d
    return samples * total
