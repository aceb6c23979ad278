"""A very small CoCa whose weights all matter, a batch for it, and a tiny run."""

from pathlib import Path

import torch

from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.model import CoCa

BOTH = {"itc": 1.0, "caption": 2.0}
SETTINGS = {
    "family": "coca", "embed_dim": 32, "image_size": 32, "patch_size": 8, "vision_width": 48, "vision_layers": 2,
    "vision_head_width": 16, "pooler_queries": 6, "pooler_heads": 4, "text_width": 32, "text_layers": 2, "text_heads": 2,
    "decoder_layers": 2, "decoder_heads": 4, "max_text_len": 24,
}  # fmt: skip


def tiny_model(tasks=BOTH, dtype=torch.float64, **changes) -> CoCa:
    torch.manual_seed(1)
    settings = {**SETTINGS, "vocab_size": 50} | changes
    if settings.get("attentional_pool") == "none":
        settings["vision_width"] = settings["text_width"]
    model = CoCa(CoCaSettings(**settings), tasks).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_batch(batch: int = 5, length: int = 24, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, one of which fills the context, with the word of id 0 in them."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length - 3, (batch,), generator=g)
    lengths[-1] = length
    ids = torch.randint(0, 50, (batch, length), generator=g)
    masks = (torch.arange(length)[None] < lengths[:, None]).long()
    images = torch.randn(batch, 3, 32, 32, generator=g, dtype=dtype)
    return {"image": images, "text_ids": ids * masks, "text_masks": masks}


def tiny_coca(data: Path, **changes) -> dict:
    """Two stages of a few steps: contrast, then contrast and captions."""

    def stage(name: str, tasks: dict, **more) -> dict:
        return {
            "name": name,
            "tasks": tasks,
            "data": {"shards": [str(data / "train")], "transform": "square_transform", "lanes": 8},
            "global_batch_size": 8,
            "steps": 3,
            "log_images_every": 0,
            "optimizer": {"lr": 1e-3, "gradient_clipping": 1.0},
            **more,
        }

    held_out = {"shards": [str(data / "test")], "batch_size": 16}
    recipe = {
        "name": "tiny",
        "model": {**SETTINGS, "max_text_len": 40},
        "tokenizer": {"name": "train", "vocab_size": 200},
        "stages": [stage("contrast", {"itc": None}), stage("both", {"itc": None, "caption": None})],
        "retrieval": {**held_out, "gallery": 2},
        "captioning": {**held_out, "max_length": 12, "gallery": 2},
    }
    recipe.update(changes)
    return recipe
