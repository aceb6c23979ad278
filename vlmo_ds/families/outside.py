"""Models outside of the one that learns: teachers whose features of patches it learns, and tokenizers of images.

They are no part of it: their weights are nowhere but in memory, whole on every rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.layers import given, normalize
from vlmo_ds.config import RecipeError
from vlmo_ds.families.finished import find_stage, load_model
from vlmo_ds.families.step import Batch, FamilyModel
from vlmo_ds.weights_file import STAGE, WEIGHTS


class Outside:
    """image [B, 3, S, S] uint8 -> what such a model says of its patches [B, P, ...], row by row; images of another size than it takes are
    resampled. Tokenizers compute in float32 whatever the run does: a token is the same in every precision."""

    def __init__(self, model: nn.Module, size: int, says: Callable[[Tensor, torch.dtype], Tensor], digest: str = ""):
        """digest: a checksum of its weights, where it is a run of this project."""
        self.model, self.size, self.says, self.digest = model.eval().requires_grad_(False), size, says, digest
        self.where: tuple[torch.device, torch.dtype] | None = None

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dtype: that of its weights."""
        if self.where != (image_BCHW.device, dtype):
            self.where = (image_BCHW.device, dtype)
            self.model.to(*self.where)
        return self.says(resampled(image_BCHW, self.size), dtype)


def resampled(image_BCHW: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, S, S] of this size, bicubic. Those of uint8 by way of floats: a GPU resamples no others, and all devices shall give the
    same pixels."""
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    floats = image_BCHW if image_BCHW.is_floating_point() else image_BCHW.float()
    found = F.interpolate(floats, size=(size, size), mode="bicubic", antialias=True)
    return found if image_BCHW.is_floating_point() else found.round().clamp(0, 255).to(image_BCHW.dtype)


class TokensOfImages(FamilyModel):
    """A model that may predict the visual tokens of masked patches: those of the data, or what a tokenizer outside of it makes of the batch."""

    tokenizer: Outside | None = None

    @property
    def predicts_tokens(self) -> bool:
        """Whether its tasks do."""
        raise NotImplementedError

    def open(self) -> None:
        config: Any = self.config
        if self.predicts_tokens and config.visual_tokenizer and self.tokenizer is None:
            side = config.image_size // config.patch_size
            self.tokenizer = opened_tokenizer(config.visual_tokenizer, side, config.num_visual_tokens)

    def open_as(self, other: TokensOfImages) -> None:
        self.tokenizer = other.tokenizer

    def outside(self) -> dict[str, str]:
        return {"model.visual_tokenizer": self.tokenizer.digest} if self.tokenizer else {}

    @torch.no_grad()
    def visual_tokens(self, batch: Batch, prefix: str = "") -> Tensor:
        """[B, P] int64, of the images of a stream, with whose prefix the names in the batch begin."""
        if (tokens := batch.get(f"{prefix}visual_tokens")) is not None:
            return tokens
        self.open()
        return given(self.tokenizer, "model.visual_tokenizer")(batch[f"{prefix}image"])


def opened_teacher(name: str, side: int, width: int) -> Outside:
    """The teacher of this name: a finished run of this project, or a vision model of transformers. RecipeError where its features are not of
    side x side patches, or not so wide."""
    is_run = (Path(name) / "recipe.yaml").is_file() or (Path(name) / STAGE).is_file()
    teacher = of_run(name, "encode_patches", "model.teacher")[0] if is_run else of_transformers(name)
    found = check_grid(teacher, side, f"model.teacher: {name}").shape[-1]
    if found != width:
        raise RecipeError(
            f"model.teacher: {name} has features of width {found}, and model.teacher_dim is {width}: take {found}"
        )
    return teacher


def opened_tokenizer(name: str, side: int, codes: int) -> Outside:
    """The tokenizer of images of this name, a finished run of this project. RecipeError where it does not give one of so many tokens to each of
    side x side patches."""
    tokenizer, config = of_run(name, "tokenize", "model.visual_tokenizer")
    check_grid(tokenizer, side, f"model.visual_tokenizer: {name}")
    if config.num_codes != codes:
        raise RecipeError(
            f"model.num_visual_tokens is {codes}, and model.visual_tokenizer {name} has {config.num_codes} codes: take {config.num_codes}"
        )
    return tokenizer


def digest_of(name: str) -> str:
    """What tells a tokenizer of images, a finished run, from others: a checksum of its weights."""
    try:
        folder = find_stage(Path(name), "tokenize")[2]
    except RecipeError as error:
        raise RecipeError(f"model.visual_tokenizer: {error}") from None
    return digest_in(folder)


def digest_in(folder: Path) -> str:
    """Of a stage's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]


def check_grid(model: Outside, side: int, what: str) -> Tensor:
    """What it says of an image of zeros. RecipeError where that is not of side x side patches."""
    found = model(torch.zeros(1, 3, model.size, model.size, dtype=torch.uint8), next(model.model.parameters()).dtype)
    patches = found.shape[1]
    grid = math.isqrt(patches)
    if patches != side * side:
        shape = f"{grid} x {grid}" if grid * grid == patches else f"{patches}"
        raise RecipeError(
            f"{what} speaks of {shape} patches of an image, the model has {side} x {side} (image_size over patch_size): take one of the same grid"
        )
    return found


def of_run(name: str, call: str, setting: str) -> tuple[Outside, Any]:
    """A finished run's model asked by a call of it, and its settings."""
    try:
        _, recipe, folder = find_stage(Path(name), call)
        model = load_model(recipe, folder)
    except RecipeError as error:
        raise RecipeError(f"{setting}: {error}") from None

    def says(image: Tensor, dtype: torch.dtype) -> Tensor:
        return model({"image": image}, call)

    return Outside(model, model.config.image_size, says, digest_in(folder)), model.config


def of_transformers(name: str) -> Outside:
    from transformers import AutoConfig, AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config = AutoConfig.from_pretrained(name)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        model: Any = AutoModel.from_pretrained(name)
    except Exception as error:  # transformers, the hub and safetensors each have their own
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model.teacher: {name} is no finished run of this project, and cannot be opened as a vision model of transformers: {why}"
        ) from None
    vision = getattr(config, "vision_config", config)
    tower = getattr(model, "vision_model", model)
    if not {"image_size", "patch_size"} <= set(dir(vision)):
        raise RecipeError(
            f"model.teacher: {name} ({config.model_type}) has no image_size and patch_size: accepted are vision transformers"
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    mean, std = settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
    projection = getattr(model, "visual_projection", None)  # CLIP's, behind its last norm

    def features(image: Tensor, dtype: torch.dtype) -> Tensor:
        tokens_BLD = tower(pixel_values=normalize(image, tuple(mean), tuple(std), dtype)).last_hidden_state
        patches_BPD = tokens_BLD[:, tokens_BLD.shape[1] - patches :]  # behind class token and registers
        return patches_BPD if projection is None else projection(tower.post_layernorm(patches_BPD))

    return Outside(model, vision.image_size, features)
