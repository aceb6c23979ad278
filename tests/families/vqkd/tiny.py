"""A very small visual tokenizer, a batch for it, and its recipe with a tiny teacher."""

import json
from pathlib import Path

import torch
from conftest import run_ranks, tiny_recipe, write_yaml

from vlmo_ds.families.vqkd.config import VQKDSettings
from vlmo_ds.families.vqkd.model import VQKD

SETTINGS = {
    "family": "vqkd", "embed_dim": 32, "depth": 2, "num_heads": 2, "num_codes": 12, "code_dim": 6, "teacher_dim": 32, "image_size": 32,
    "patch_size": 8, "decay": 0.8,
}  # fmt: skip


def tiny_model(dtype=torch.float64, **changes) -> VQKD:
    torch.manual_seed(1)
    model = VQKD(VQKDSettings(**{**SETTINGS, "vocab_size": 5} | changes), {"vqkd": 1.0}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_batch(batch: int = 4, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (batch, 3, 32, 32), generator=g, dtype=torch.uint8),
        "teacher_features": torch.randn(batch, 16, 32, generator=g, dtype=dtype),
        "sample_id": torch.arange(batch) + 100 * seed,
    }


def tiny_tokenizer(data: Path, teacher: Path, steps: int = 6, **changes) -> dict:
    """The recipe of one stage."""
    stage = {
        "name": "tokenizer",
        "tasks": {"vqkd": None},
        "data": {"shards": [str(data / "train")], "transform": "square_transform", "lanes": 8},
        "global_batch_size": 8,
        "steps": steps,
        "log_images_every": 0,
        "optimizer": {"lr": 3e-4, "eps": 1e-6, "gradient_clipping": 1.0},
    }
    return {"name": "tiny", "model": {**SETTINGS, "teacher": str(teacher)} | changes, "stages": [stage]}


def run(folder: Path, recipe: dict, ranks: int, zero: int, *words: str, **config) -> Path:
    """Trains a recipe; the run's folder."""
    run_ranks([*command_of(folder, recipe, zero, **config), *words], ranks)
    return folder / "run"


def command_of(folder: Path, recipe: dict, zero: int, **config) -> list[str]:
    folder.mkdir(exist_ok=True)
    file = write_yaml(folder / "recipe.yaml", recipe)
    (folder / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": zero}, "steps_per_print": 10**9, **config})
    )
    return [
        "train_ds.py",
        "--recipe",
        str(file),
        "--deepspeed_config",
        str(folder / "ds.json"),
        "--output_dir",
        str(folder / "run"),
    ]


def image_stage(data: Path, **changes) -> dict:
    """The tiny run, whose image stage is of pixels or, by the changes to its model, of tokens."""
    recipe = tiny_recipe(data, retrieval=None)
    recipe["model"] |= changes
    return recipe
