"""A very small BEiT-3 whose weights all matter, and a batch for it."""

from pathlib import Path

import torch

from vlmo_ds.families.beit3 import build
from vlmo_ds.families.beit3.config import BEiT3Settings
from vlmo_ds.families.beit3.model import BEiT3

MASKED = {"mim": 1.0, "textmlm": 1.0, "mvlm": 1.0}
ALL = {**MASKED, "itc": 1.0, "itm": 1.0}
SETTINGS = {
    "family": "beit3", "embed_dim": 32, "depth": 3, "num_heads": 4, "image_size": 32, "patch_size": 8, "max_text_len": 24,
    "max_source_positions": 30, "num_visual_tokens": 11,
}  # fmt: skip
MASK = 49  # the word


def tiny_model(tasks=ALL, dtype=torch.float64, **changes) -> BEiT3:
    torch.manual_seed(1)
    settings = {**SETTINGS, "vocab_size": 50, "mask_word": MASK, "vqav2_label_size": 6, "num_classes": 6}
    model = build(BEiT3Settings(**settings | changes), tasks).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def texts(batch: int, length: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Of different lengths, one of them as long as it may be."""
    lengths = torch.randint(4, length - 3, (batch,), generator=g)
    lengths[-1] = length
    masks = (torch.arange(length)[None] < lengths[:, None]).long()
    ids = torch.randint(5, MASK, (batch, length), generator=g) * masks
    labels = torch.full_like(ids, -100)
    labels[1:, 2:4] = ids[1:, 2:4]  # of the first text nothing is masked
    return {
        "text_ids": ids,
        "text_masks": masks,
        "text_ids_mlm": ids.masked_fill(labels != -100, MASK),
        "text_labels_mlm": labels,
    }


def images(batch: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "image": torch.randn(batch, 3, 32, 32, generator=g, dtype=torch.float64).to(dtype),
        "image_mask": torch.rand(batch, 16, generator=g) < 0.4,
        "visual_tokens": torch.randint(11, (batch, 16), generator=g),
    }


def tiny_batch(batch: int = 5, length: int = 16, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs, and beside them images and texts alone, of other numbers and lengths."""
    g = torch.Generator().manual_seed(seed)
    found = {**texts(batch, length, g), **images(batch, g, dtype)}
    found |= {f"images/{name}": value for name, value in images(batch - 1, g, dtype).items()}
    found |= {f"texts/{name}": value for name, value in texts(batch + 2, length - 4, g).items()}
    ids = torch.arange(batch) + 100 * seed
    found |= {"image_0": found["image"], "image_1": found["image"].flip(0), "answers": torch.arange(batch) % 2}
    found["label"] = torch.randint(6, (batch,), generator=g)
    found |= {"vqa_targets": torch.rand(batch, 6, generator=g), "image_id": ids, "sample_id": ids}
    return found | {"negative_seed": torch.tensor(3), "step_seed": torch.tensor(7)}


def streams_of(tasks, data: dict) -> dict:
    """Data for those of the tasks that read images or texts alone, but for one kind, which `data` is for."""
    kinds = list(dict.fromkeys({"mim": "images", "textmlm": "texts"}.get(task, "") for task in tasks))
    first = "" if "" in kinds else kinds[0]
    return {kind: {"data": data, "global_batch_size": 8} for kind in kinds if kind != first}


def masked_beit3(data: Path, tokenizer: Path, **changes) -> dict:
    """A stage of masked data modelling, over pairs, images and texts of different numbers."""

    def shards(name: str) -> dict:
        return {"shards": [str(data / name)], "transform": "square_transform", "lanes": 8}

    stage = {
        "name": "pretrain",
        "tasks": {"mim": None, "textmlm": None, "mvlm": None},
        "data": {**shards("train"), "mlm_probability": 0.5},
        "streams": {
            "images": {"data": shards("train"), "global_batch_size": 16},
            "texts": {"data": shards("text"), "global_batch_size": 4},
        },
        "global_batch_size": 8,
        "steps": 6,
        "log_images_every": 0,
        "optimizer": {"lr": 3e-4, "eps": 1e-6, "gradient_clipping": 1.0},
    }
    model = {**SETTINGS, "max_text_len": 40, "max_source_positions": 42, "num_visual_tokens": 12}
    recipe = {
        "name": "tiny",
        "model": model | {"visual_tokenizer": str(tokenizer)},
        "tokenizer": {"name": "train", "vocab_size": 200},
        "stages": [stage],
    }
    recipe.update(changes)
    return recipe


def tiny_beit3(data: Path, **changes) -> dict:
    """Two stages of a few steps: contrast with matching, then captions."""

    def stage(name: str, tasks: dict, **more) -> dict:
        return {
            "name": name,
            "tasks": tasks,
            "data": {"shards": [str(data / "train")], "transform": "square_transform", "lanes": 8},
            "global_batch_size": 8,
            "steps": 4,
            "log_images_every": 0,
            "optimizer": {"lr": 3e-4, "eps": 1e-6, "gradient_clipping": 1.0},
            **more,
        }

    held_out = {"shards": [str(data / "test")], "batch_size": 16}
    init = {"fresh": ["mlm_head.*"], "drop": ["*_head.weight", "logit_scale", "itm_*"]}
    recipe = {
        "name": "tiny",
        "model": {**SETTINGS, "max_text_len": 40, "max_source_positions": 42},
        "tokenizer": {"name": "train", "vocab_size": 200},
        "stages": [stage("pairs", {"itc": None, "itm": None}), stage("captions", {"captioning": None}, init=init)],
        "captioning": {**held_out, "max_length": 12, "gallery": 2},
    }
    recipe.update(changes)
    return recipe
