"""What a step of the visual tokenizer costs: operations, memory, bytes on the wire. For `plan`. The teacher counts as an encoder as large as
the tokenizer's, whose weights plan does not know."""

from __future__ import annotations

from vlmo_ds.config import StageConfig
from vlmo_ds.families.interface import Load
from vlmo_ds.families.vqkd.config import VQKDSettings
from vlmo_ds.families.vqkd.model import VQKD


def stack_flops(config: VQKDSettings, depth: int) -> float:
    """Of one image."""
    tokens, d = config.patches + 1, config.embed_dim
    return depth * (tokens * 24 * d**2 + 4 * tokens**2 * d)


def forward_flops(config: VQKDSettings, stage: StageConfig, samples: float = 1.0) -> float:
    """Multiply-adds times two of the forward pass. What has no backward pass counts as a third of its own: the teacher's, and the search for
    the nearest code."""
    d, patches = config.embed_dim, config.patches
    encoder = stack_flops(config, config.depth) + 2 * patches * 3 * config.patch_size**2 * d
    heads = 2 * patches * d * (3 * d + 2 * config.code_dim + config.teacher_dim)
    search = 2 * patches * config.num_codes * config.code_dim
    return samples * (encoder + stack_flops(config, config.decoder_depth) + heads + (encoder + search) / 3)


def activations(config: VQKDSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Estimates of what the forward pass leaves for the backward pass (12 tensors of a block's width a token), and of the similarities with
    the codes."""
    every, row = config.recompute_every, config.embed_dim * load.bytes
    blocks = config.depth + config.decoder_depth
    share = 1 - (-(-blocks // every) / blocks if every else 0)  # of blocks that keep everything
    inputs = 0 if load.offloaded else row
    per_sample = blocks * (config.patches + 1) * (share * 12 * row + (1 - share) * inputs)
    features = load.micro * config.patches * (3 * config.teacher_dim + 4 * config.code_dim) * 4
    logits = min(load.micro * config.patches * config.num_codes, 1 << 24) * 4
    return {"activations": load.micro * per_sample, "logits": logits, "features": features, "collector": 0.0}


def collectives(config: VQKDSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step for the codes' counts and sums."""
    return {"all-reduce": 2 * (load.ranks - 1) / load.ranks * 8 * config.num_codes * (config.code_dim + 1)}


def walks(model: VQKD, stage: StageConfig) -> dict[str, int]:
    """How often a forward pass enters the module that holds a parameter: once."""
    return {name: 1 for name, _ in model.named_parameters()}
