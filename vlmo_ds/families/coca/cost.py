"""What CoCa's step costs: operations, memory, bytes on the wire. For `plan`; texts count as long as they may be."""

from __future__ import annotations

from typing import NamedTuple

from vlmo_ds.config import StageConfig
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.model import CoCa
from vlmo_ds.families.cost import contrast_memory, contrast_wire
from vlmo_ds.families.interface import Load, matches
from vlmo_ds.objectives.captioning import CHUNK


class Stack(NamedTuple):
    """Blocks of a tower: how many, tokens of a sequence, tokens that they attend to, width, hidden width over it."""

    layers: int
    tokens: int
    context: int
    width: int
    ratio: float


def stacks(config: CoCaSettings, stage: StageConfig) -> list[Stack]:
    image, text = config.patches + 1, config.max_text_len
    whole = text + ("itc" in stage.tasks)
    found = [
        Stack(config.vision_layers, image, image, config.vision_width, config.vision_mlp_ratio),
        Stack(config.text_layers, whole, whole, config.text_width, config.mlp_ratio),
    ]
    if "caption" in stage.tasks:
        for context in (text - 1, config.caption_tokens):
            found.append(Stack(config.decoder_layers, text - 1, context, config.text_width, config.mlp_ratio))
    return found


def poolers(config: CoCaSettings) -> list[tuple[int, int, int]]:
    """(queries, tokens that they attend to, width of these) of every attentional pooler."""
    if config.attentional_pool == "none":
        return []
    image = config.patches + 1
    found = [(config.pooler_queries, image, config.vision_width)]
    if config.attentional_pool == "cascade":
        found.append((1, config.pooler_queries, config.embed_dim))
    elif config.attentional_pool == "parallel":
        found.append((1, image, config.vision_width))
    return found


def forward_flops(config: CoCaSettings, stage: StageConfig, samples: float = 1.0) -> float:
    """Multiply-adds times two of the forward pass: linear layers, attention products, patches, vocabulary head."""
    total = 2.0 * config.patches * 3 * config.patch_size**2 * config.vision_width
    for one in stacks(config, stage):
        linear = (one.tokens * (4 + 4 * one.ratio) + 4 * one.context) * one.width**2
        total += one.layers * (linear + 4 * one.tokens * one.context * one.width)
    d = config.embed_dim
    for queries, tokens, width in poolers(config):
        # queries are projected once a batch
        total += 2 * queries * d**2 + 4 * tokens * width * d + 4 * queries * tokens * d
    if "itc" in stage.tasks:
        total += 2 * d * (config.token_width + config.text_width)
    if "caption" in stage.tasks:
        total += 2 * (config.max_text_len - 1) * config.text_width * config.vocab_size
    return samples * total


def activations(config: CoCaSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Estimates of what the forward pass leaves for the backward pass (8 tensors of a block's width and 1 of its hidden
    width a token), of a chunk of vocabulary logits, and of contrastive features."""
    b, every = load.bytes, config.recompute_every
    per_sample = 0.0
    for one in stacks(config, stage):
        share = 1 - (-(-one.layers // every) / one.layers if every else 0)  # of blocks that keep everything
        row = one.width * b
        inputs = 0 if load.offloaded else row
        kept = (8 + one.ratio) * row
        per_sample += one.layers * one.tokens * (share * kept + (1 - share) * inputs)
    for queries, tokens, width in poolers(config):
        per_sample += (4 * queries * config.embed_dim + tokens * width) * b
    logits = features = 0.0
    if "caption" in stage.tasks:
        logits = 3 * min(CHUNK, load.micro * (config.max_text_len - 1)) * config.vocab_size * 4
    if "itc" in stage.tasks:
        features, chunk = contrast_memory(2, config.embed_dim, stage, load)
        logits += chunk
    return {"activations": load.micro * per_sample, "logits": logits, "features": features, "collector": 0.0}


def collectives(config: CoCaSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step for contrastive features and their gradients."""
    if "itc" not in stage.tasks:
        return {}
    return dict.fromkeys(("all-gather", "reduce-scatter"), contrast_wire(2, config.embed_dim, load))


def walks(model: CoCa, stage: StageConfig) -> dict[str, int]:
    """How often a forward pass enters the module that holds a parameter: once, or never where no task reaches it."""
    idle = model.idle()
    return {name: int(not matches(name, idle)) for name, _ in model.named_parameters()}
