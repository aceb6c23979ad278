"""A very small BLIP whose weights all matter, a batch for it, and a tiny run."""

from pathlib import Path

import torch

from vlmo_ds.families.blip import build
from vlmo_ds.families.blip.base import BLIPModel
from vlmo_ds.families.blip.config import BLIPSettings

ALL = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
SETTINGS = {
    "family": "blip", "embed_dim": 16, "image_size": 32, "patch_size": 8, "vision_width": 48, "vision_layers": 2, "vision_heads": 3,
    "text_width": 32, "text_layers": 2, "text_heads": 2, "text_hidden": 64, "positions": 48, "max_text_len": 24, "queue_size": 20,
}  # fmt: skip


MORE = {"fresh": ["itm_head.*", "text_decoder.*"]}  # what the second stage has beside the first


def tiny_model(tasks=ALL, dtype=torch.float64, **changes) -> BLIPModel:
    torch.manual_seed(1)
    model = build(BLIPSettings(**{**SETTINGS, "vocab_size": 50} | changes), tasks).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_batch(batch: int = 5, length: int = 24, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, one of which is as long as it may be."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length - 3, (batch,), generator=g)
    lengths[-1] = length
    ids = torch.randint(1, 48, (batch, length), generator=g)
    masks = (torch.arange(length)[None] < lengths[:, None]).long()
    return {
        "image": torch.randn(batch, 3, 32, 32, generator=g, dtype=dtype),
        "text_ids": ids * masks,
        "text_masks": masks,
        "image_id": torch.arange(batch) + 100,
        "sample_id": torch.arange(batch) + 1000,
        "negative_seed": torch.tensor(seed),
    }


def tiny_blip(data: Path, **changes) -> dict:
    """Two stages of a few steps: contrast alone, then all tasks."""

    def stage(name: str, tasks: dict, **more) -> dict:
        return {
            "name": name,
            "tasks": tasks,
            "data": {"shards": [str(data / "train")], "transform": "square_transform", "lanes": 8},
            "global_batch_size": 8,
            "steps": 3,
            "log_images_every": 0,
            "optimizer": {"lr": 3e-4, "gradient_clipping": 1.0},
            **more,
        }

    held_out = {"shards": [str(data / "test")], "batch_size": 16}
    recipe = {
        "name": "tiny",
        "model": {**SETTINGS, "max_text_len": 40},
        "tokenizer": {"name": "train", "vocab_size": 200},
        "stages": [stage("contrast", {"itc": None}), stage("all", {"itc": None, "itm": None, "lm": None}, init=MORE)],
        "retrieval": {**held_out, "gallery": 2, "rerank": 4},
        "captioning": {**held_out, "max_length": 12, "gallery": 2},
    }
    recipe.update(changes)
    return recipe
