"""The recipe: every setting of a run, its type, default and meaning. Bad settings die here, before anything is built.

A recipe is YAML. It says WHAT is trained; a DeepSpeed config (ds_configs/) says HOW it is spread over devices.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from vlmo_ds import shipped

QUICKSTART = "launch/recipes/quickstart.yaml"  # the recipe of commands that name none
LARGEST_YAML, MOST_YAML_VALUES, DEEPEST_YAML = 1 << 20, 50_000, 50  # bytes, values, levels
FINE_TUNING = ("irtr", "vqa", "nlvr2")
TASKS = ("mim", "textmlm", "mlm", "itc", "itm", *FINE_TUNING)
LARGEST_BLOCK = 1_000_000  # samples
ONE_MODALITY = dict.fromkeys(("mim", "textmlm"), "trains on one modality")
REFERENCE_WEIGHTS = dict.fromkeys(TASKS, 1.0) | {"mlm": 0.25}

# Sizes of the published models (VLMo, arXiv:2111.02358; base-plus from the official code).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vlmo_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12, "vlffn_start_layer_index": 10},
    "vlmo_base_plus_patch16": {
        "embed_dim": 544,
        "depth": 24,
        "num_heads": 16,
        "vlffn_start_layer_index": 21,
        "use_abs_pos_emb": True,
        "need_relative_position_embed": False,
        "layer_scale_init_values": None,
    },
    "vlmo_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "vlffn_start_layer_index": 21},
}

# What a stage trains, by name; a recipe may list its own patterns (fnmatch) instead.
TRAINABLE: dict[str, list[str]] = {
    "all": ["*"],
    "image_only": [
        "transformer.patch_embed.*",
        "transformer.cls_token",
        "transformer.mask_token",
        "transformer.pos_embed",
        "transformer.blocks.*.norm1.*",
        "transformer.blocks.*.attn.*",
        "transformer.blocks.*.gamma_?",
        "transformer.blocks.*.norm2_imag.*",
        "transformer.blocks.*.mlp_imag.*",
        "transformer.norm.*",
        "relative_position_bias_table",
        "token_type_embeddings.*",
        "mim_score.*",
    ],
    "text_only": [  # as the reference: attention, norm1, gammas, vision and VL experts are frozen
        "text_embeddings.*",
        "token_type_embeddings.*",
        "transformer.blocks.*.norm2_text.*",
        "transformer.blocks.*.mlp_text.*",
        "transformer.norm.*",
        "relative_position_bias_table",
        "mlm_score.*",
    ],
}


class RecipeError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is accepted."""


class Settings(BaseModel):
    """Numbers are finite and of 64 bits; true and false are no numbers (YAML reads `yes` and `on` as true)."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        accepted = cls.model_fields[info.field_name].annotation  # type: ignore[index]  # a field's validator has its name
        held = value.values() if isinstance(value, dict) and get_origin(accepted) is dict else [value]
        if bool not in (accepted, *get_args(accepted)) and any(isinstance(one, bool) for one in held):
            raise ValueError("true and false are not accepted here")
        return value

    @field_validator("*")
    @classmethod
    def at_most_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("accepted: whole numbers of at most 64 bits")
        return value


class ModelConfig(Settings):
    """The architecture. `arch` fills in the sizes of a published model; single settings may still differ."""

    arch: Literal["custom", "vlmo_base_patch16", "vlmo_base_plus_patch16", "vlmo_large_patch16"] = Field(
        "custom", description="a published architecture, or custom"
    )
    embed_dim: int = Field(192, gt=0, description="width D")
    depth: int = Field(6, gt=0, description="number of blocks")
    num_heads: int = Field(3, gt=0, description="attention heads; must divide embed_dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of an expert over D")
    vlffn_start_layer_index: int = Field(5, gt=0, description="first block with a vision-language expert")
    image_size: int = Field(224, gt=0, description="pixels per side")
    patch_size: int = Field(16, gt=0, description="pixels per side of a patch; must divide image_size")
    max_text_len: int = Field(40, gt=2, description="longest text in tokens, [CLS] and [SEP] included")
    max_text_len_of_initckpt: int = Field(196, gt=2, description="text length the relative table has rows for")
    vocab_size: int = Field(0, ge=0, description="size of the vocabulary; 0: the tokenizer's")
    vqav2_label_size: int = Field(0, ge=0, description="answers that vqa chooses among; 0: those of its data")
    use_abs_pos_emb: bool = Field(False, description="absolute image positions")
    need_relative_position_embed: bool = Field(True, description="relative position bias; else absolute text positions")
    layer_scale_init_values: float | None = Field(0.1, gt=0, description="initial LayerScale; null: no LayerScale")
    init_std: float = Field(
        0.02, gt=0, le=10, description="std of initial weights; narrow models want more, about 1/sqrt(embed_dim)"
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    text_dropout: float | None = Field(None, ge=0, lt=1, description="dropout of text embeddings; null: drop_path_rate")
    attention: Literal["auto", "sdpa", "explicit"] = Field(
        "auto", description="auto: torch's kernel on GPUs, written out on CPUs"
    )
    activation_checkpoint_every: int = Field(
        0, ge=0, description="recompute activations in backward: 0 never, 1 every block, n every n-th"
    )

    @model_validator(mode="before")
    @classmethod
    def fill_architecture(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {**ARCHITECTURES.get(str(data.get("arch")), {}), **data}
        return data

    @model_validator(mode="after")
    def check_sizes(self) -> ModelConfig:
        if self.image_size % self.patch_size:
            near = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size is {self.image_size}, which is not a multiple of patch_size {self.patch_size}: "
                f"take {max(near, self.patch_size)} or {near + self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves experts of embed_dim {self.embed_dim} no hidden unit")
        if self.vlffn_start_layer_index > self.depth:
            raise ValueError(
                f"vlffn_start_layer_index is {self.vlffn_start_layer_index}, the model has {self.depth} blocks: "
                f"take 1 to {self.depth} ({self.depth}: no VL experts)"
            )
        if self.need_relative_position_embed and self.max_text_len > self.max_text_len_of_initckpt:
            raise ValueError(
                f"max_text_len is {self.max_text_len}, but the relative position table has rows for texts of up to "
                f"max_text_len_of_initckpt {self.max_text_len_of_initckpt} tokens"
            )
        return self

    @property
    def text_dropout_rate(self) -> float:
        return self.drop_path_rate if self.text_dropout is None else self.text_dropout


class TokenizerConfig(Settings):
    """Where word pieces come from."""

    name: str = Field(
        "train",
        description="a Hugging Face name, a directory, a vocab.txt, or 'train': WordPiece on the run's own text",
    )
    vocab_size: int = Field(2000, gt=10, description="size of the vocabulary that 'train' makes")


Transform = Literal[
    "square_transform", "square_transform_randaug", "pixelbert", "pixelbert_randaug", "crop_flip", "crop_flip_randaug"
]


class SourceConfig(Settings):
    """One source of a mixture."""

    shards: list[str] = Field(
        min_length=1, description="tar files, folders of them, URLs; {000..009} and * are expanded"
    )
    index: str | None = Field(None, description="index file; null: the index.json beside the shards")
    weight: float = Field(1.0, ge=1e-9, le=1e12, description="share of the samples, relative to the other sources")
    transform: Transform | None = Field(None, description="augmentation of this source's images; null: the data's")


class DataConfig(Settings):
    """Training data: one set of shards or a mixture of sources, and how a sample becomes a model input."""

    shards: list[str] = Field([], description="tar files, folders of them, URLs; {000..009} and * are expanded")
    index: str | None = Field(None, description="index file of `shards`; null: the index.json beside them")
    sources: dict[str, SourceConfig] = Field({}, description="a mixture, instead of `shards`: name -> source")
    mixing: Literal["random", "exact"] = Field(
        "random",
        description="random: each sample's source is drawn by weight; exact: weights are whole numbers, and every run "
        "of sum(weights) samples holds so many of each source",
    )
    transform: Transform = Field("square_transform_randaug", description="augmentation of images (data/transforms.py)")
    image_only: bool | None = Field(None, description="read images alone, no text; null: what the tasks need")
    text_only: bool | None = Field(None, description="read text alone, no images; null: what the tasks need")
    draw_false_image: int = Field(0, ge=0, description="images of other samples added to each (false_image_0, ...)")
    draw_false_text: int = Field(0, ge=0, description="texts of other samples added to each (false_text_0_ids, ...)")
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="share of words that are masked")
    whole_word_masking: bool = Field(True, description="mask all pieces of a word together")
    mim_ratio: float = Field(0.4, gt=0, lt=1, description="share of patches that are masked (BEiT: 0.4)")
    lanes: int = Field(
        64, gt=0, description="parts that each epoch is cut into; a rank stays on its own where ranks divide it"
    )
    shuffle: int = Field(4096, gt=0, description="window of the shuffle within a lane, in samples")
    length_bucketing: int = Field(
        1, gt=0, description="batches whose samples are sorted by text length together and cut anew; 1: none"
    )
    workers: int = Field(0, ge=0, le=1024, description="loader processes per rank")
    prefetch: int = Field(4, gt=0, description="batches that each loader process keeps ready")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="stop when a larger share of a source's samples cannot be used"
    )
    cache: str | None = Field(None, description="folder for copies of remote shards; null: in the temporary directory")
    cache_size_gb: float = Field(100.0, gt=0, description="copies not used for longest are removed beyond this")
    tries: int = Field(6, gt=0, le=1000, description="times a remote shard is asked for before it counts as missing")
    stall_seconds: float = Field(
        60.0, gt=0, le=86_400, description="a transfer without a byte for so long is begun anew"
    )

    @model_validator(mode="after")
    def check_sources(self) -> DataConfig:
        if bool(self.shards) == bool(self.sources):
            raise ValueError(
                f"{'both' if self.shards else 'neither'} of shards and sources given: name shards, or sources for a mixture"
            )
        if self.sources and self.index:
            raise ValueError("index belongs to shards; in a mixture it is given for each source")
        fractions = {name: s.weight for name, s in self.sources.items() if s.weight != int(s.weight)}
        if self.mixing == "exact" and fractions:
            raise ValueError(f"mixing 'exact' needs whole numbers as weights, found {fractions}")
        if self.mixing == "exact" and (total := sum(s.weight for s in self.sources.values())) > LARGEST_BLOCK:
            raise ValueError(
                f"mixing 'exact' plans as many samples at a time as the weights add up to, found {total:,.0f}; accepted: "
                f"{LARGEST_BLOCK:,} at most: divide the weights by a common factor, or take mixing 'random'"
            )
        if self.image_only and (self.text_only or self.draw_false_text):
            raise ValueError("image_only leaves no text: text_only and draw_false_text have to be off")
        if self.text_only and self.draw_false_image:
            raise ValueError("text_only leaves no images: draw_false_image has to be 0")
        return self

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """All sources; `shards` are one called 'data'."""
        return self.sources or {"data": SourceConfig(shards=self.shards, index=self.index)}


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW (arXiv:1711.05101) with the reference's values."""

    lr: float = Field(2e-4, gt=0, le=10, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW's betas, from 0 to below 1")
    eps: float = Field(1e-8, gt=0, lt=1, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.01, ge=0, le=100, description="not applied to biases, norms, positions, tokens and scales"
    )
    head_lr_multiplier: float = Field(1.0, gt=0, description="learning rate of the vqa and nlvr2 classifiers over lr")
    gradient_clipping: float = Field(0.0, ge=0, description="largest global gradient norm; 0: no clipping")


class ScheduleConfig(Settings):
    """Learning rate over the steps of a stage."""

    name: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    warmup_steps: int | float = Field(0.1, ge=0, description="steps, or a share of the stage's steps if below 1")

    @model_validator(mode="after")
    def check_warmup(self) -> ScheduleConfig:
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps is {self.warmup_steps}; accepted: a whole number, or a share below 1")
        return self


class InitConfig(Settings):
    """A stage's initial weights. Every key is accounted for: what is neither loaded nor named here is an error."""

    weights: str = Field("previous", description="'previous' stage, 'fresh', or a .safetensors/.pt file or folder")
    fresh: list[str] = Field(
        [], description="patterns of parameters that start fresh although the source may have them"
    )
    drop: list[str] = Field([], description="patterns of the source's weights that are not wanted")
    max_text_len_of_initckpt: int | None = Field(
        None, gt=2, description="text length that the source's relative table has rows for; null: the model's"
    )
    vl_experts: Literal["keep", "fresh", "text", "image"] = Field(
        "keep", description="VL experts: as in the source, fresh, or copies of the text or image experts"
    )


class StageConfig(Settings):
    """One stage of training."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="names the stage in logs, checkpoints and --stages")
    tasks: dict[str, float | None] = Field(description="task -> weight; null: the reference's weight")
    data: DataConfig
    trainable: str | list[str] = Field("all", description=f"{', '.join(TRAINABLE)}, or patterns of parameter names")
    global_batch_size: int = Field(gt=0, description="samples per optimiser step over all ranks")
    micro_batch_size: int | None = Field(
        None, gt=0, description="samples per rank and forward pass; null: no gradient accumulation"
    )
    gradient_cache: bool = Field(
        False,
        description="irtr or itc over the whole global batch although only micro_batch_size samples are in memory, at the "
        "price of one more forward pass",
    )
    steps: int = Field(gt=0, description="optimiser steps")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    init: InitConfig = InitConfig()
    checkpoint_every: int = Field(1000, ge=0, description="steps between checkpoints; 0: at the stage's end only")
    log_images_every: int = Field(500, ge=0, description="steps between sample images in TensorBoard; 0: never")

    @model_validator(mode="after")
    def check_tasks(self) -> StageConfig:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task '{task}' is not known{nearest(task, TASKS)}; accepted: {', '.join(TASKS)}")
        if not self.tasks:
            raise ValueError(f"tasks is empty; accepted: {', '.join(TASKS)}")
        for task, weight in self.weights.items():
            if weight < 0:
                raise ValueError(
                    f"tasks.{task} is {weight}; accepted: a weight of at least 0, or null (the reference's)"
                )
        if not any(self.weights.values()):
            raise ValueError(f"tasks: all weights are 0 ({', '.join(self.tasks)}), so that nothing would be trained")
        if self.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, longer than the stage, whose steps are {self.steps}; "
                "accepted: at most the stage's steps, or a share of them below 1"
            )
        for alone, why in {**ONE_MODALITY, **dict.fromkeys(FINE_TUNING, "has data of its own")}.items():
            if alone in self.tasks and len(self.tasks) > 1:
                raise ValueError(f"task '{alone}' {why} and goes alone in a stage, found {list(self.tasks)}")
        if self.gradient_cache and set(self.tasks) not in ({"itc"}, {"irtr"}):
            raise ValueError(
                f"gradient_cache is for a stage whose only task is irtr or itc, found {list(self.tasks)}: "
                "the other losses are sums over samples, for which micro_batch_size alone is enough"
            )
        if self.gradient_cache and self.micro_batch_size is None:
            raise ValueError("gradient_cache needs micro_batch_size: samples per rank that are in memory at a time")
        for setting, alone_task in (("image_only", "mim"), ("text_only", "textmlm")):
            if getattr(self.data, setting) and set(self.tasks) != {alone_task}:
                raise ValueError(
                    f"data.{setting} is true, which fits task '{alone_task}' alone, found {list(self.tasks)}"
                )
        for setting, alone_task in (("draw_false_image", "textmlm"), ("draw_false_text", "mim")):
            if getattr(self.data, setting) and alone_task in self.tasks:
                raise ValueError(f"data.{setting} is {getattr(self.data, setting)}, but task '{alone_task}' reads none")
        if "itm" in self.tasks and "itc" not in self.tasks:
            raise ValueError(
                "task 'itm' draws its negatives from the similarities of 'itc': add itc to the stage's tasks"
            )
        if isinstance(self.trainable, str) and self.trainable not in TRAINABLE:
            raise ValueError(
                f"trainable is '{self.trainable}'{nearest(self.trainable, TRAINABLE)}; accepted: {', '.join(TRAINABLE)}, "
                "or a list of patterns"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {task: REFERENCE_WEIGHTS[task] if w is None else w for task, w in self.tasks.items()}

    @property
    def trainable_patterns(self) -> list[str]:
        return TRAINABLE[self.trainable] if isinstance(self.trainable, str) else self.trainable

    @property
    def warmup(self) -> int:
        steps = self.schedule.warmup_steps
        return round(steps * self.steps) if steps < 1 else int(steps)


HeldOut = TypeVar("HeldOut", bound="HeldOutConfig")


class HeldOutConfig(Settings):
    """What every evaluation after the last stage reads."""

    shards: list[str] = Field(min_length=1, description="held-out shards")
    batch_size: int = Field(64, gt=0, description="images, pairs, questions or sentences per forward pass")

    @classmethod
    def of(cls: type[HeldOut], settings: HeldOutConfig | None, name: str, **given: Any) -> HeldOut:
        """The recipe's settings, and over them those of the command line that are not None.

        RecipeError if neither names shards.
        """
        given = {key: value for key, value in given.items() if value is not None}
        if settings is None and "shards" not in given:
            raise RecipeError(f"--shards is missing, and the run's recipe has no '{name}'")
        return cls(**((settings.model_dump() if settings else {}) | given))


class EvaluationConfig(HeldOutConfig):
    """VQA or NLVR2 on held-out shards after the last stage."""

    workers: int = Field(0, ge=0, le=1024, description="loader processes per rank")


class RetrievalConfig(HeldOutConfig):
    """Retrieval on held-out shards after the last stage."""

    max_images: int = Field(0, ge=0, description="use the first so many images; 0: all")
    rerank: int = Field(16, ge=0, description="candidates per query that the itm head scores again; 0: none")
    folds: int = Field(1, gt=0, description="averages over so many parts as well; COCO 1k: 5, of 5,000 images")
    gallery: int = Field(12, ge=0, description="queries shown in the report")


class SpikeConfig(Settings):
    """A guard against jumps of the loss: back to the last checkpoint before the jump, and past its data."""

    window: int = Field(100, gt=1, description="steps whose median loss is the level to compare with")
    factor: float = Field(2.0, gt=1, description="a loss of more than this many medians is high")
    patience: int = Field(10, gt=0, description="high steps in a row that make a jump")
    max_rollbacks: int = Field(3, gt=0, description="times that a stage goes back before the run stops")


class Recipe(Settings):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="the run's directory is runs/<name>")
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of initial weights, data order, masks, augmentation and dropout"
    )
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    stages: list[StageConfig] = Field(min_length=1)
    retrieval: RetrievalConfig | None = Field(None, description="null: no retrieval after the last stage")
    vqa: EvaluationConfig | None = Field(None, description="null: no questions answered after the last stage")
    nlvr2: EvaluationConfig | None = Field(None, description="null: no pairs of images judged after the last stage")
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept per stage")
    background_checkpoints: bool = Field(
        True, description="write checkpoints while training goes on, from a copy in host memory"
    )
    checkpoint_failures: int = Field(
        3, ge=0, description="checkpoints in a row that may fail to be written (a full disk) before the run stops"
    )
    max_nonfinite_steps: int = Field(
        5, ge=0, description="steps in a row that may be left out for a loss or gradient that is not finite"
    )
    loss_spike: SpikeConfig | None = Field(None, description="null: no guard against jumps of the loss")
    check_ranks: bool | None = Field(
        None, description="compare what the ranks are about to compute before every forward pass; null: under ZeRO-3"
    )

    @model_validator(mode="after")
    def check_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        if self.name.strip(".") == "":
            raise ValueError(f"name is '{self.name}', which names no folder of its own below runs/")
        patches = (self.model.image_size // self.model.patch_size) ** 2
        for stage in self.stages:
            if "mim" in stage.tasks and not 0 < round(stage.data.mim_ratio * patches) < patches:
                raise ValueError(
                    f"stages.{stage.name}.data.mim_ratio is {stage.data.mim_ratio}: of {patches} patches some have to be "
                    "masked and some seen"
                )
        return self


def number(kind: type, least: float | None = None) -> Callable[[str], Any]:
    """An argparse type: a finite number above 0, or of at least `least`."""

    def parse(text: str) -> Any:
        accepted = "above 0" if least is None else f"of at least {least}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (value <= 0 if least is None else value < least):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, accepted: {what} {accepted}")
        return value

    return parse


def nearest(word: str | int, known: Sequence[str] | dict) -> str:
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` overrides, as in `stages.joint.steps=100` or `model.depth=4`.

    A stage that is set to null is left out.
    """
    data = read_recipe(Path(path))
    for override in overrides:
        apply_override(data, override)
    if isinstance(data.get("stages"), list):
        data["stages"] = [stage for stage in data["stages"] if stage is not None]
    return parse_recipe(data, str(path))


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's settings. One that `extends` another (a file beside it) has that one's, but for its name, and for what
    it lists under `settings`, dotted names and values."""
    path = shipped.find("recipes", path)
    if not path.is_file():
        known = shipped.names("recipes")
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(f"recipe {path} {what}{nearest(path.stem, known)}; in launch/recipes: {', '.join(known)}")
    try:
        data = read_yaml(path.read_bytes(), f"recipe {path}")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path} holds {type(data).__name__}, expected settings such as 'model:' and 'stages:'"
        )
    if "extends" not in data:
        return data
    parent = path.parent / str(data.pop("extends"))
    if parent.resolve() in below:
        raise RecipeError(f"recipe {path} extends {parent}, which extends it in turn")
    settings, name = data.pop("settings", {}), data.pop("name", path.stem)
    if data or not isinstance(settings, dict):
        raise RecipeError(
            f"recipe {path} extends another: beside 'extends' it takes 'name' and 'settings' (dotted names and values), "
            f"found {', '.join(map(str, data)) or settings}"
        )
    whole = read_recipe(parent, (*below, path.resolve())) | {"name": name}
    for key, value in settings.items():
        set_value(whole, str(key), value, f"{path}: settings.{key}")
    return whole


def read_yaml(content: bytes, source: str) -> Any:
    """What a YAML file holds: plain values, lists and dictionaries. RecipeError, which begins with `source`, for what is no
    YAML, for keys that are given twice, and for what would take more time or memory than any recipe."""
    try:
        if len(content) > LARGEST_YAML:
            raise RecipeError(f"{source} has {len(content):,} bytes, at most {LARGEST_YAML:,} are read")
        text = content.decode()
        look_through(text, source)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source} is not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{source} is not valid YAML: {error}") from None


class OpenNode:
    """A list or dictionary that is being read: its anchor, the values in it, and a dictionary's keys so far."""

    def __init__(self, event: yaml.Event):
        self.anchor = getattr(event, "anchor", None)
        self.values, self.children = 1, 0
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None


def look_through(text: str, source: str) -> None:
    """Reads YAML event by event, which needs neither time nor memory for what aliases and brackets would unfold to."""
    sizes: dict[str | None, int] = {}  # anchor -> values that it stands for
    nodes: list[OpenNode] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        key, line = None, event.start_mark.line + 1  # type: ignore[union-attr]  # parsed events have one
        if isinstance(event, (yaml.DocumentStartEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            nodes.append(OpenNode(event))
            if len(nodes) > DEEPEST_YAML:
                raise RecipeError(f"{source} has more than {DEEPEST_YAML} lists or settings inside one another")
            continue
        if isinstance(event, yaml.ScalarEvent):
            anchor, size, key = event.anchor, 1, event.value
        elif isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in nodes):
                raise RecipeError(f"{source}: line {line}: '*{event.anchor}' is inside of what it stands for")
            anchor, size = None, sizes.get(event.anchor, 1)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            ended = nodes.pop()
            anchor, size = ended.anchor, ended.values
        else:
            continue
        if anchor:
            sizes[anchor] = size
        outer = nodes[-1]
        outer.values += size
        if outer.values > MOST_YAML_VALUES:
            raise RecipeError(f"{source} stands for more than {MOST_YAML_VALUES:,} values")
        if outer.keys is not None and outer.children % 2 == 0 and key is not None and key != "<<":
            if key in outer.keys:
                raise RecipeError(f"{source} has the setting '{key}' twice (line {line})")
            outer.keys.add(key)
        outer.children += 1


def parse_recipe(data: dict, source: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"recipe {source}:"] + [f"  {explain(item, data)}" for item in error.errors()]
        raise RecipeError("\n".join(lines).encode("utf-8", "backslashreplace").decode()) from None
    except UnicodeEncodeError as error:
        raise RecipeError(f"recipe {source} holds half a surrogate pair, which is no character: {error}") from None


def apply_override(data: dict, override: str) -> None:
    """Sets one value in nested settings; a part of the key may be a stage's name, its number, or * for every stage."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not of the form key=value, such as stages.joint.steps=100")
    value = read_yaml(text.encode(), f"override '{override}': the value")
    set_value(data, key, value, f"override '{override}'")


def set_value(data: dict, key: str, value: Any, source: str) -> None:
    targets: list[Any] = [data]
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        targets = [found for target in targets for found in descend(target, part, source, ".".join(parts[:depth]))]
    for target in targets:
        if isinstance(target, list):
            replaced = descend(target, parts[-1], source, ".".join(parts[:-1]))
            target[:] = [value if any(old is entry for old in replaced) else entry for entry in target]
        elif isinstance(target, dict):
            target[parts[-1]] = value
        else:
            raise RecipeError(f"{source}: '{'.'.join(parts[:-1])}' has no settings in it")


def descend(target: Any, part: str, source: str, parent: str) -> list[Any]:
    if isinstance(target, list):
        if part == "*":
            return target
        named = [x for i, x in enumerate(target) if str(i) == part or (isinstance(x, dict) and x.get("name") == part)]
        if not named:
            names = ", ".join(str(x.get("name", i)) if isinstance(x, dict) else str(i) for i, x in enumerate(target))
            raise RecipeError(f"{source}: {parent} has no '{part}'; accepted: {names} or *")
        return named
    if not isinstance(target, dict):
        raise RecipeError(f"{source}: '{parent}' has no settings in it")
    if target.get(part) is None:
        target[part] = {}
    return [target[part]]


def explain(item: ErrorDetails, data: dict) -> str:
    """One validation error as a sentence: where, what was found, what is accepted."""
    location = [part for part in item["loc"]]
    where = []
    node: Any = data
    for part in location:
        name = part
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
            name = node.get("name", part) if isinstance(node, dict) else part
        elif isinstance(node, dict):
            node = node.get(part)
        where.append(str(name))
    place = ".".join(where) or "recipe"
    if item["type"] == "extra_forbidden":
        known = known_settings(location[:-1])
        return f"{place}: unknown setting{nearest(location[-1], known)}; accepted: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{place}: missing, and it has no default"
    found = item["input"]
    shown = "" if isinstance(found, dict) else f" (found {found!r})"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{shown}"


def known_settings(location: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else model
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and get_origin(inner) is None and issubclass(inner, Settings):
                model = inner
    return sorted(model.model_fields)
