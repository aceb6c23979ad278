"""Settings that every family shares: their types, defaults and meanings. Bad settings die here, before anything is built.

A recipe (YAML, recipe_file.py) says WHAT is trained; a DeepSpeed config (ds_configs/) says HOW it is spread over devices.
What a model has, and what a stage may ask of it, its family says (families/).
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlmo_ds.families.interface import Family, Task

LARGEST_BLOCK = 1_000_000  # samples


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
    """What the settings of every family's model have. `arch` fills in the sizes of a published model; single settings may
    still differ."""

    architectures: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name -> its settings
    extra_words: ClassVar[int] = 0  # words of the model's own, behind the tokenizer's

    arch: str = Field("custom", description="a published architecture, or custom")
    family: str = Field("", description="the family of models that a custom architecture is of")
    image_size: int = Field(224, gt=0, description="pixels per side")
    patch_size: int = Field(16, gt=0, description="pixels per side of a patch; must divide image_size")
    max_text_len: int = Field(40, gt=2, description="longest text in tokens, special ones included")
    vocab_size: int = Field(
        0, ge=0, description="size of the vocabulary; 0: the tokenizer's and what words the model has of its own"
    )
    vqav2_label_size: int = Field(0, ge=0, description="answers that questions choose among; 0: those of their data")
    recompute: Literal["none", "cheap", "blocks"] | int = Field(
        "cheap",
        description="what the backward pass computes again in place of keeping it. none: nothing; cheap: what costs little beside its size "
        "(outputs of GELU and, by the family, of norms, attention's probabilities, keys and values of images that texts look at); "
        "blocks: every block; n: every n-th block, the others as cheap",
    )
    kernels: Literal["auto", "torch", "apex"] = Field(
        "auto",
        description="layer norms in training: PyTorch's or NVIDIA Apex's; auto: Apex's on a GPU where it is installed",
    )

    compile: Literal["none", "blocks"] = Field(
        "none",
        description="blocks: a norm and the feed-forward layers behind it compiled to fewer kernels by torch.compile (not those of BERT's layers)",
    )

    @model_validator(mode="before")
    @classmethod
    def fill_architecture(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if "activation_checkpoint_every" in data:  # the name that the setting had, and its values
                data = dict(data)
                every = data.pop("activation_checkpoint_every")
                former = {0: "cheap", 1: "blocks"}
                data.setdefault("recompute", former.get(every, every) if type(every) is int else every)
            return {**cls.architectures.get(str(data.get("arch")), {}), **data}
        return data

    @field_validator("recompute", mode="before")
    @classmethod
    def check_recompute(cls, value: Any) -> Any:
        if value in ("none", "cheap", "blocks") or (type(value) is int and value > 0):
            return value
        raise ValueError("accepted: none, cheap, blocks, or a whole number n from 1 on (every n-th block)")

    @model_validator(mode="after")
    def check_patches(self) -> ModelConfig:
        self.refuse_parts_of_patches("image_size", self.image_size)
        return self

    def refuse_parts_of_patches(self, setting: str, image_size: int) -> None:
        """ValueError where patches do not fill an image of this size, which a setting says."""
        side = self.patch_size
        if image_size % side:
            near = image_size // side * side
            raise ValueError(
                f"{setting} is {image_size}, which is not a multiple of patch_size {side}: take {max(near, side)} or {near + side}"
            )

    def check_stage(self, stage: StageConfig) -> None:
        """ValueError where a stage asks what the model cannot do."""

    def take_words(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets what is left to the tokenizer."""
        self.vocab_size = self.vocab_size or len(tokenizer) + self.extra_words

    @property
    def recompute_every(self) -> int:
        """Of how many blocks one is computed again as a whole, 0: of none."""
        return self.recompute if isinstance(self.recompute, int) else int(self.recompute == "blocks")

    @property
    def patches(self) -> int:
        """Of one image."""
        return (self.image_size // self.patch_size) ** 2


class ContrastSettings(Settings):
    """Of families whose contrast has several kinds."""

    itc_kind: Literal["softmax", "sigmoid"] = Field(
        "softmax",
        description="contrast: softmax: each row against all columns (CLIP); sigmoid: each pair as a yes or no of its own, with a bias (SigLIP)",
    )
    positives: Literal["pair", "image"] = Field(
        "pair",
        description="contrast: what goes together. pair: an image and its caption; image: all captions of the same picture, and all pictures with "
        "the same caption",
    )


class VisualTokenSettings(Settings):
    """Of families that predict the visual tokens of masked patches."""

    visual_tokenizer: str = Field(
        "",
        description="a finished run of a visual tokenizer, which tokenizes the images of each step; not needed where data.visual_tokens names tokens "
        "that were made before",
    )
    num_visual_tokens: int = Field(
        0, ge=0, le=1 << 16, description="codes of the visual tokenizer; 0: none are predicted"
    )

    def check_tokens(self, stage: StageConfig) -> None:
        """ValueError where a stage predicts visual tokens, and nothing gives them."""
        for part in stage.parts.values():
            if "masked_image" not in part.reads:
                continue
            if not self.num_visual_tokens:
                raise ValueError(
                    f"num_visual_tokens is 0, and stages.{stage.name} predicts them: take the number of the tokenizer's codes"
                )
            if not (self.visual_tokenizer or part.data.has_visual_tokens):
                raise ValueError(
                    f"stages.{stage.name} predicts visual tokens, and its images have none: name a tokenizer's finished run in "
                    "model.visual_tokenizer, or its tokens in data.visual_tokens"
                )
            if stage.evaluate.held_out and not self.visual_tokenizer:
                raise ValueError(
                    f"stages.{stage.name}.evaluate.held_out names shards, whose images' visual tokens a tokenizer makes: name its finished run in "
                    "model.visual_tokenizer"
                )


class ClassSettings(Settings):
    """Of families that say which of some classes an image is of."""

    num_classes: int = Field(0, ge=0, description="classes that an image is one of; 0: no head for them")

    def check_classes(self, stage: StageConfig) -> None:
        """ValueError where a stage learns classes, and it is not said how many there are."""
        if not self.num_classes and any("label" in part.reads for part in stage.parts.values()):
            raise ValueError(
                f"num_classes is 0, and stages.{stage.name} learns classes of images: take as many as the labels number"
            )


class ImageTowerConfig(ModelConfig):
    """Of families whose image tower has absolute positions."""

    vision_width: int = Field(192, gt=0, description="width of the image tower")
    vision_layers: int = Field(6, gt=0, description="blocks of the image tower")
    position_init: Literal["normal", "sincos"] = Field(
        "normal",
        description="initial positions of the image tower: random, or sines and cosines of row and column, by which a small model sees "
        "from the start which patches are near (arXiv:2205.01580)",
    )

    @model_validator(mode="after")
    def check_positions(self) -> ImageTowerConfig:
        if self.position_init == "sincos" and self.vision_width % 4:
            raise ValueError(f"position_init is sincos, and vision_width {self.vision_width} is not a multiple of 4")
        return self


TokenizerKind = Literal["wordpiece", "byte_bpe"]


class TokenizerConfig(Settings):
    """Where word pieces come from."""

    name: str = Field(
        "train",
        description="a Hugging Face name, a directory, a vocab.txt, CLIP's bpe_simple_vocab_16e6.txt.gz, a SentencePiece model (.spm, .model), or 'train': "
        "word pieces of the run's own text",
    )
    kind: TokenizerKind = Field(
        "wordpiece",
        description="what 'train' makes: wordpiece (BERT's, uncased, for up to 1,000 different characters) or byte_bpe "
        "(pairs of bytes, for any script: no text has an unknown piece)",
    )
    vocab_size: int = Field(2000, gt=10, description="size of the vocabulary that 'train' makes")


Transform = Literal[
    "square_transform", "square_transform_randaug", "pixelbert", "pixelbert_randaug", "crop_flip", "crop_flip_randaug"
]
WHOLE = "square_transform"
CROPPING = ("square_transform_randaug", "crop_flip", "crop_flip_randaug")  # those that take random crops


class SourceConfig(Settings):
    """One source of a mixture."""

    shards: list[str] = Field(
        min_length=1, description="tar files, folders of them, URLs; {000..009} and * are expanded"
    )
    index: str | None = Field(None, description="index file; null: the index.json beside the shards")
    visual_tokens: str | None = Field(None, description="folder of this source's visual tokens; null: the data's")
    weight: float = Field(1.0, ge=1e-9, le=1e12, description="share of the samples, relative to the other sources")
    transform: Transform | None = Field(None, description="augmentation of this source's images; null: the data's")


class DataConfig(Settings):
    """Training data: one set of shards or a mixture of sources, and how a sample becomes a model input."""

    shards: list[str] = Field([], description="tar files, folders of them, URLs; {000..009} and * are expanded")
    index: str | None = Field(None, description="index file of `shards`; null: the index.json beside them")
    visual_tokens: str | None = Field(
        None,
        description="folder of the visual tokens that `vlmo tokenize` has made of the shards' images; null: they are made in each step",
    )
    sources: dict[str, SourceConfig] = Field({}, description="a mixture, instead of `shards`: name -> source")
    mixing: Literal["random", "exact"] = Field(
        "random",
        description="random: each sample's source is drawn by weight; exact: weights are whole numbers, and every run "
        "of sum(weights) samples holds so many of each source",
    )
    transform: Transform = Field("square_transform_randaug", description="augmentation of images (data/transforms.py)")
    min_scale: float | None = Field(
        None, gt=0, le=1, description="share of the area that a random crop has at least; null: the transform's"
    )
    flip: bool = Field(
        True, description="mirror random crops by chance; false where captions say what is left and what is right"
    )
    image_only: bool | None = Field(None, description="read images alone, no text; null: what the tasks need")
    text_only: bool | None = Field(None, description="read text alone, no images; null: what the tasks need")
    draw_false_image: int = Field(0, ge=0, description="images of other samples added to each (false_image_0, ...)")
    draw_false_text: int = Field(0, ge=0, description="texts of other samples added to each (false_text_0_ids, ...)")
    prompt: str = Field(
        "", description="what every caption begins with; a task that writes captions learns the words behind it alone"
    )
    questions_per_image: int = Field(
        1, gt=0, le=1000, description="questions that a step asks of an image, all of them where it has fewer"
    )
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
        transforms = {source.transform or self.transform for source in self.mixture.values()}
        for setting, asked in (("min_scale", self.min_scale is not None), ("flip", not self.flip)):
            if asked and not transforms & set(CROPPING):
                raise ValueError(
                    f"{setting} is {getattr(self, setting)}, and no source takes random crops (transform is "
                    f"{', '.join(sorted(transforms))}); accepted with {', '.join(CROPPING)}"
                )
        given = [name for name, source in self.mixture.items() if source.visual_tokens or self.visual_tokens]
        if given and len(given) < len(self.mixture):
            raise ValueError(
                f"visual_tokens are there for {', '.join(given)}, and not for the other sources: name those of all, or of none"
            )
        for source in self.mixture.values():
            tokens, transform = source.visual_tokens or self.visual_tokens, source.transform or self.transform
            if tokens and transform != WHOLE:
                raise ValueError(
                    f"visual_tokens is {tokens}, of whole pictures resized to a square, and transform is {transform}, whose crops have other tokens; "
                    f"accepted: {WHOLE}, or visual_tokens null (model.visual_tokenizer makes them in each step)"
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

    @property
    def has_visual_tokens(self) -> bool:
        """Whether those of all images have been made before."""
        return all(source.visual_tokens or self.visual_tokens for source in self.mixture.values())


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW (arXiv:1711.05101) with the reference's values, Lion, or Muon."""

    name: Literal["adamw", "lion", "muon"] = Field(
        "adamw",
        description="lion (arXiv:2302.06675) wants a learning rate 3 to 10 times lower, and a decay as much higher; muon (arXiv:2502.16982) "
        "takes the matrices of blocks at AdamW's learning rate, which the rest has",
    )
    lr: float = Field(2e-4, gt=0, le=10, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW's or Lion's betas, from 0 to below 1")
    eps: float = Field(1e-8, gt=0, lt=1, description="AdamW's epsilon")
    momentum: Beta = Field(0.95, description="muon: what of a matrix's momentum stays in a step")
    weight_decay: float = Field(
        0.01, ge=0, le=100, description="not applied to biases, norms, positions, tokens and scales"
    )
    head_lr_multiplier: float = Field(1.0, gt=0, description="learning rate of the fine-tuning classifiers over lr")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a block over that of the one above it; embeddings are below the first (BEiT)",
    )
    lr_multipliers: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        {}, description="pattern of parameter names -> learning rate over lr; of several that fit the first"
    )
    gradient_clipping: float = Field(0.0, ge=0, description="largest global gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def check_read(self) -> OptimizerConfig:
        for setting, readers in (("eps", ("adamw", "muon")), ("momentum", ("muon",))):
            value, usual = getattr(self, setting), type(self).model_fields[setting].default
            if value != usual and self.name not in readers:
                raise ValueError(
                    f"{setting} is {value}, which is for {' and '.join(readers)}, found name '{self.name}'; accepted: {usual}"
                )
        return self


class ScheduleConfig(Settings):
    """Learning rate over the steps of a stage."""

    name: Literal["linear", "cosine", "constant", "step"] = Field(
        "linear", description="decay after the warm-up; step: times `decay` after every `decay_every` steps"
    )
    warmup_steps: int | float = Field(0.1, ge=0, description="steps, or a share of the stage's steps if below 1")

    decay: float = Field(0.9, gt=0, le=1, description="step: what the learning rate is multiplied with")
    decay_every: int = Field(0, ge=0, description="step: so many steps, such as those of an epoch")

    @model_validator(mode="after")
    def check_step(self) -> ScheduleConfig:
        if (self.name == "step") != bool(self.decay_every):
            raise ValueError(
                f"decay_every is {self.decay_every} and name '{self.name}'; accepted: above 0 with 'step', and 0 with the others"
            )
        if self.name != "step" and self.decay != (usual := ScheduleConfig.model_fields["decay"].default):
            raise ValueError(f"decay is {self.decay}, which is for name 'step', found '{self.name}'; accepted: {usual}")
        return self

    @model_validator(mode="after")
    def check_warmup(self) -> ScheduleConfig:
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps is {self.warmup_steps}; accepted: a whole number, or a share below 1")
        return self


class EMAConfig(Settings):
    """A moving average of a stage's trained weights, in float32."""

    decay: float = Field(0.9999, gt=0, lt=1, description="what of the average stays in a step")
    every: int = Field(1, gt=0, description="steps between two updates, each with so many steps' decay")
    warmup: bool = Field(
        True, description="a decay of at most (1 + step) / (10 + step), so that the first steps are soon forgotten"
    )


class InitConfig(Settings):
    """A stage's initial weights. Every key is accounted for: what is neither loaded nor named here is an error."""

    weights: str | list[str] = Field(
        "previous",
        description="'previous' stage, 'fresh', a .safetensors/.pt file or folder, or a list of these, each with a part of the weights",
    )
    fresh: list[str] = Field(
        [], description="patterns of parameters that start fresh although the source may have them"
    )
    drop: list[str] = Field([], description="patterns of the source's weights that are not wanted")

    @property
    def files(self) -> list[str]:
        """Where the weights are, of which 'previous' and 'fresh' are no part."""
        if isinstance(self.weights, str):
            return [] if self.weights in ("previous", "fresh") else [self.weights]
        return self.weights

    @model_validator(mode="after")
    def check_weights(self) -> InitConfig:
        if isinstance(self.weights, list):
            if odd := next((one for one in self.weights if one in ("previous", "fresh")), None):
                raise ValueError(f"weights lists '{odd}'; accepted in a list: files and folders")
            if not self.weights:
                raise ValueError("weights is an empty list; accepted: 'previous', 'fresh', or files and folders")
        return self


class ScoresConfig(Settings):
    """What is measured every `evaluate_every` steps of a stage, beside the recipe's evaluations that its tasks allow."""

    held_out: list[str] = Field(
        [], description="shards whose losses are measured by the stage's tasks, without augmentation"
    )
    batches: int = Field(
        16, gt=0, description="batches of held-out samples at most, as large as the ranks' in training"
    )
    weights: Literal["trained", "ema"] = Field(
        "trained", description="what is measured: the weights, or their moving average"
    )
    best: str | None = Field(
        None,
        description="a metric, such as held_out/loss, whose best weights are kept in <stage>/best; of losses the lowest is the best",
    )
    patience: int = Field(
        0, ge=0, description="evaluations without a better value after which the stage ends; 0: never"
    )

    @model_validator(mode="after")
    def check_best(self) -> ScoresConfig:
        if self.patience and self.best is None:
            raise ValueError(
                f"patience is {self.patience}, for a better value of no metric: name it in best, or take 0"
            )
        first, _, rest = (self.best or "").partition("/")
        if self.best is not None and (not rest or first not in ("held_out", *EVALUATIONS)):
            raise ValueError(
                f"best is '{self.best}'; accepted: a metric of {', '.join(('held_out', *EVALUATIONS))}, such as held_out/loss"
            )
        if first == "held_out" and not self.held_out:
            raise ValueError(f"best is '{self.best}', and held_out names no shards to measure it on")
        return self


class StreamConfig(Settings):
    """More data of a stage, which some of its tasks read in every step beside the others'."""

    data: DataConfig
    global_batch_size: int = Field(gt=0, description="samples of this data per optimiser step over all ranks")


class StageConfig(Settings):
    """One stage of training."""

    family: ClassVar[Family]  # of the model; Family.recipe makes a class that has it

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="names the stage in logs, checkpoints and --stages")
    tasks: dict[str, float | None] = Field(description="task -> weight; null: the reference's weight")
    data: DataConfig
    streams: dict[str, StreamConfig] = Field(
        {},
        description="more data, by the names that the family's tasks have for it, such as images and texts alone beside pairs: a step reads all of "
        "them",
    )
    trainable: str | list[str] = Field(
        "all", description="a name that the family knows, or patterns of parameter names"
    )
    global_batch_size: int = Field(gt=0, description="samples per optimiser step over all ranks")
    micro_batch_size: int | None = Field(
        None, gt=0, description="samples per rank and forward pass; null: no gradient accumulation"
    )
    gradient_cache: bool = Field(
        False,
        description="contrast over the whole global batch although only micro_batch_size samples are in memory, at the "
        "price of one more forward pass",
    )
    steps: int = Field(gt=0, description="optimiser steps")
    image_size: int | None = Field(
        None,
        gt=0,
        description="pixels per side in this stage, whose positions are resampled from its initial weights'; null: model.image_size",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    init: InitConfig = InitConfig()
    ema: EMAConfig | None = Field(None, description="null: no moving average of the weights")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations while the stage trains; 0: never")
    evaluate: ScoresConfig = ScoresConfig()
    checkpoint_every: int = Field(1000, ge=0, description="steps between checkpoints; 0: at the stage's end only")
    log_images_every: int = Field(500, ge=0, description="steps between sample images in TensorBoard; 0: never")

    @model_validator(mode="after")
    def check_tasks(self) -> StageConfig:
        known = self.family.tasks
        for name in self.tasks:
            if name not in known:
                raise ValueError(f"task '{name}' is not known{nearest(name, known)}; accepted: {', '.join(known)}")
        if not self.tasks:
            raise ValueError(f"tasks is empty; accepted: {', '.join(known)}")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(
                    f"tasks.{name} is {weight}; accepted: a weight of at least 0, or null (the reference's)"
                )
        if not any(self.weights.values()):
            raise ValueError(f"tasks: all weights are 0 ({', '.join(self.tasks)}), so that nothing would be trained")
        if self.evaluate != ScoresConfig() and not self.evaluate_every:
            raise ValueError(
                "evaluate has settings, and evaluate_every is 0: nothing would be measured; accepted: 1 or more"
            )
        if self.evaluate.weights == "ema" and self.ema is None:
            raise ValueError(
                "evaluate.weights is 'ema', and the stage has no moving average (ema); accepted: 'trained'"
            )
        if self.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}, longer than the stage, whose steps are {self.steps}; "
                "accepted: at most the stage's steps, or a share of them below 1"
            )
        for name, task in self.chosen.items():
            if task.alone and len(self.tasks) > 1:
                raise ValueError(f"task '{name}' {task.alone} and goes alone in a stage, found {list(self.tasks)}")
        kinds = {task.gradient_cache for task in self.chosen.values()}
        if self.gradient_cache and ("features" not in kinds or "" in kinds):
            cached, beside = (
                " or ".join(sorted(name for name, task in known.items() if task.gradient_cache == kind))
                for kind in ("features", "beside")
            )
            also = f", with {beside} beside it" if beside else ""
            raise ValueError(
                f"gradient_cache is for a stage with the task {cached}{also} and no other, found {list(self.tasks)}: "
                "the other losses are sums over samples, for which micro_batch_size alone is enough"
            )
        if self.gradient_cache and self.micro_batch_size is None:
            raise ValueError("gradient_cache needs micro_batch_size: samples per rank that are in memory at a time")
        self.check_streams()
        for part in self.parts.values():
            part.check_modalities()
        for name, task in self.chosen.items():
            for other, why in task.needs.items():
                if other not in self.tasks:
                    raise ValueError(f"task '{name}' {why}: add {other} to the stage's tasks")
        if isinstance(self.trainable, str) and self.trainable not in self.family.trainable:
            names = self.family.trainable
            raise ValueError(
                f"trainable is '{self.trainable}'{nearest(self.trainable, names)}; accepted: {', '.join(names)}, "
                "or a list of patterns"
            )
        return self

    def check_streams(self) -> None:
        """ValueError where data that a task reads is missing, or data is there that none reads, or does not go along with micro_batch_size."""
        wanted = dict.fromkeys(task.stream for task in self.chosen.values())
        readers = {stream: [name for name, task in self.chosen.items() if task.stream == stream] for stream in wanted}
        known = sorted({task.stream for task in self.family.tasks.values() if task.stream})
        for stream in self.streams:
            if stream not in wanted:
                accepted = ", ".join(known) or f"none: {self.family.name} has tasks of one kind of data"
                raise ValueError(
                    f"streams.{stream} is read by none of {', '.join(self.tasks)}{nearest(stream, known)}; accepted: {accepted}"
                )
        without = [stream for stream in wanted if stream not in self.streams]
        if len(without) > 1:
            missing = next(filter(None, reversed(without)))
            other = next(stream for stream in without if stream != missing)
            raise ValueError(
                f"streams.{missing} is missing, the data that {', '.join(readers[missing])} reads; data is that of {', '.join(readers[other])}"
            )
        if not without:
            raise ValueError(
                f"data is read by none of {', '.join(self.tasks)}, which all have streams of their own: leave one of these out"
            )
        if micro := self.micro_batch_size:
            for stream, settings in self.streams.items():
                if settings.global_batch_size * micro % self.global_batch_size:
                    raise ValueError(
                        f"streams.{stream}.global_batch_size is {settings.global_batch_size}, which does not go along with global_batch_size "
                        f"{self.global_batch_size} and micro_batch_size {micro}: its forward passes have to have as many samples each"
                    )

    @property
    def parts(self) -> dict[str, StageConfig]:
        """The stage's data, one by one, each as a stage of the tasks that read it, by the name of their stream. `data` is that of the one which
        `streams` has not, and comes first."""
        wanted = dict.fromkeys(task.stream for task in self.chosen.values())
        if not self.streams:
            return {next(iter(wanted)): self}
        found = {}
        for stream in sorted(wanted, key=lambda name: name in self.streams):
            tasks = {name: weight for name, weight in self.tasks.items() if self.family.tasks[name].stream == stream}
            update: dict[str, Any] = {"tasks": tasks, "streams": {}}
            if stream in self.streams:
                size = self.streams[stream].global_batch_size
                update |= {"data": self.streams[stream].data, "global_batch_size": size}
                if self.micro_batch_size:
                    update["micro_batch_size"] = size * self.micro_batch_size // self.global_batch_size
            found[stream] = self.model_copy(update=update)
        return found

    @property
    def samples(self) -> int:
        """Of an optimiser step, of all data."""
        return sum(part.global_batch_size for part in self.parts.values())

    def check_modalities(self) -> None:
        """ValueError where `data` wants to leave out, or to add, what the tasks read or do not."""
        for setting, other, modality in (
            ("image_only", "draw_false_text", "image"),
            ("text_only", "draw_false_image", "text"),
        ):
            fitting = [name for name, task in self.family.tasks.items() if task.modalities == {modality}]
            if getattr(self.data, setting) and not self.tasks.keys() <= set(fitting):
                names = " or ".join(f"'{name}'" for name in fitting)
                fits = f"task {names} alone" if fitting else f"no task of {self.family.name}"
                raise ValueError(f"data.{setting} is true, which fits {fits}, found {list(self.tasks)}")
            for name in fitting:
                if getattr(self.data, other) and name in self.tasks:
                    raise ValueError(f"data.{other} is {getattr(self.data, other)}, but task '{name}' reads none")
        for setting, usual, read in (
            ("prompt", "", "text"),
            ("questions_per_image", 1, "questions"),
            ("visual_tokens", None, "masked_image"),
        ):
            value = getattr(self.data, setting)
            if value != usual and read not in self.reads:
                fitting = [name for name, task in self.family.tasks.items() if read in task.reads]
                raise ValueError(
                    f"data.{setting} is {value!r}, which is for {', '.join(fitting)}, found {list(self.tasks)}; accepted: {usual!r}"
                )

    @property
    def chosen(self) -> dict[str, Task]:
        """What the stage's tasks ask and give."""
        return {name: self.family.tasks[name] for name in self.tasks}

    @property
    def reads(self) -> frozenset[str]:
        """What the tasks read of a sample (families.interface.Task.reads)."""
        return frozenset().union(*(task.reads for task in self.chosen.values()))

    @property
    def gives(self) -> frozenset[str]:
        """The calls of the model that its tasks train."""
        return frozenset().union(*(task.gives for task in self.chosen.values()))

    @property
    def weights(self) -> dict[str, float]:
        return {task: self.family.tasks[task].weight if w is None else w for task, w in self.tasks.items()}

    @property
    def trainable_patterns(self) -> list[str]:
        return list(self.family.trainable[self.trainable]) if isinstance(self.trainable, str) else self.trainable

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
        try:
            return cls(**((settings.model_dump() if settings else {}) | given))
        except ValidationError as error:
            told = [
                (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors()
            ]
            raise RecipeError("; ".join(f"{place}: {what}" if place else what for place, what in told)) from None


class EvaluationConfig(HeldOutConfig):
    """NLVR2, or classes of images, on held-out shards after the last stage."""

    workers: int = Field(0, ge=0, le=1024, description="loader processes per rank")


class VQAConfig(EvaluationConfig):
    """Questions answered on held-out shards after the last stage."""

    method: Literal["list", "generate"] = Field(
        "list",
        description="list: the best of the answers that the run was trained with; generate: written word by word",
    )
    candidates: int = Field(
        128, gt=0, description="list, where answers are texts: those with the likeliest first words, which are compared"
    )
    beams: int = Field(3, gt=0, le=1000, description="generate: texts followed at a time")
    max_length: int = Field(10, gt=1, description="generate: words of an answer at most, start and end included")


class ZeroShotConfig(EvaluationConfig):
    """Held-out pictures classified by the names of the classes after the last stage."""

    classes: str = Field(description="file of class names, one a line, in the order of the labels")
    templates: str | None = Field(
        None, description="file of sentences with {} for the name, one a line; null: a photo of a {}, and three more"
    )


class RetrievalConfig(HeldOutConfig):
    """Retrieval on held-out shards after the last stage."""

    max_images: int = Field(0, ge=0, description="use the first so many images; 0: all")
    rerank: int = Field(16, ge=0, description="candidates per query that the matching head scores again; 0: none")
    folds: int = Field(1, gt=0, description="averages over so many parts as well; COCO 1k: 5, of 5,000 images")
    gallery: int = Field(12, ge=0, description="queries shown in the report")


class DecodingConfig(Settings):
    """How texts are written."""

    method: Literal["greedy", "beam", "sample"] = Field(
        "greedy", description="greedy: the best word each time; beam: the best of several texts; sample: by chance"
    )
    beams: int | None = Field(None, gt=0, le=1000, description="beam search: texts followed at a time; null: 3")
    length_penalty: float = Field(
        1.0, ge=-5, le=5, description="beam search: exponent of the length that a score is over"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="sampling: scores are divided by it")
    top_k: int = Field(0, ge=0, description="sampling: from the so many best words; 0: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sampling: from the best words that together have this chance")
    min_length: int = Field(0, ge=0, description="words of a text at least, its start included")
    max_length: int = Field(0, ge=0, description="words of a text at most, start and end included; 0: the model's")
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, description="above 1: words that are there already get less likely"
    )
    prompt: str = Field("", description="what every text begins with")
    num_return_sequences: int = Field(
        1, gt=0, le=1000, description="texts an image: the best of beam search, or so many samples"
    )

    @model_validator(mode="after")
    def check_method(self) -> DecodingConfig:
        defaults = type(self).model_fields
        only = {
            "temperature": "sample",
            "top_k": "sample",
            "top_p": "sample",
            "length_penalty": "beam",
            "beams": "beam",
        }
        for name, method in only.items():
            value = getattr(self, name)
            if value != defaults[name].default and self.method != method:
                raise ValueError(f"{name} is {value}, which is for method '{method}', found method '{self.method}'")
        texts = self.num_return_sequences
        if self.method == "greedy" and texts > 1:
            raise ValueError(
                f"num_return_sequences is {texts}: method 'greedy' writes one; accepted: 1, or method 'sample' or 'beam'"
            )
        if self.method == "beam" and texts > self.texts_at_once:
            raise ValueError(f"num_return_sequences is {texts}, above beams, which are {self.texts_at_once}")
        if self.max_length and self.min_length > self.max_length:
            raise ValueError(f"min_length is {self.min_length}, above max_length, which is {self.max_length}")
        return self

    @property
    def texts_at_once(self) -> int:
        """Of one image."""
        return {"greedy": 1, "beam": self.beams or 3, "sample": self.num_return_sequences}[self.method]


class CaptioningConfig(HeldOutConfig, DecodingConfig):
    """Captions written for held-out images after the last stage, and their scores."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling")
    keep_prompt: bool = Field(True, description="whether a caption holds the prompt that it was begun with")
    gallery: int = Field(24, ge=0, description="images shown with their captions in the report")


class SpikeConfig(Settings):
    """A guard against jumps of the loss: back to the last checkpoint before the jump, and past its data."""

    window: int = Field(100, gt=1, description="steps whose median loss is the level to compare with")
    factor: float = Field(2.0, gt=1, description="a loss of more than this many medians is high")
    patience: int = Field(10, gt=0, description="high steps in a row that make a jump")
    max_rollbacks: int = Field(3, gt=0, description="times that a stage goes back before the run stops")


class Recipe(Settings):
    """A whole run."""

    family: ClassVar[Family]  # of the model, as a stage's

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="the run's directory is runs/<name>")
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of initial weights, data order, masks, augmentation and dropout"
    )
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    stages: list[StageConfig] = Field(min_length=1)
    retrieval: RetrievalConfig | None = Field(None, description="null: no retrieval after the last stage")
    vqa: VQAConfig | None = Field(None, description="null: no questions answered after the last stage")
    nlvr2: EvaluationConfig | None = Field(None, description="null: no pairs of images judged after the last stage")
    captioning: CaptioningConfig | None = Field(None, description="null: no captions written after the last stage")
    zero_shot: ZeroShotConfig | None = Field(
        None, description="null: no pictures classified by the names of classes after the last stage"
    )
    classification: EvaluationConfig | None = Field(
        None, description="null: no pictures classified by a trained head after the last stage"
    )
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept per stage")
    background_checkpoints: bool = Field(
        True, description="write checkpoints while training goes on, from a copy in host memory"
    )
    checkpoint_copy: str | None = Field(
        None,
        description="a second place for checkpoints and results: a URL that fsspec knows, such as s3://bucket/runs/mine; null: none",
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
    check_bits: int = Field(
        0,
        ge=0,
        description="steps between two checks for machines that compute wrongly: a micro-batch computed twice, weights compared over ranks, "
        "these before every checkpoint too; 0: none",
    )

    @model_validator(mode="after")
    def check_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        if self.name.strip(".") == "":
            raise ValueError(f"name is '{self.name}', which names no folder of its own below runs/")
        for stage in self.stages:
            model = self.model_of(stage)
            model.refuse_parts_of_patches(f"stages.{stage.name}.image_size", model.image_size)
            patches = model.patches
            model.check_stage(stage)
            for part in stage.parts.values():
                if "masked_image" in part.reads and not 0 < round(part.data.mim_ratio * patches) < patches:
                    raise ValueError(
                        f"stages.{stage.name}.data.mim_ratio is {part.data.mim_ratio}: of {patches} patches some have to be "
                        "masked and some seen"
                    )
        for stage in self.stages:
            sections = [name for name in EVALUATIONS if getattr(self, name)]
            if stage.evaluate_every and not (stage.evaluate.held_out or sections):
                raise ValueError(
                    f"stages.{stage.name}.evaluate_every is {stage.evaluate_every}, and there is nothing to measure: name shards in "
                    f"stages.{stage.name}.evaluate.held_out, or one of {', '.join(EVALUATIONS)} in the recipe"
                )
        last = self.stages[-1]
        if self.vqa and self.vqa.method == "generate" and "answer" in last.gives and "answer_step" not in last.gives:
            raise ValueError(
                f"vqa.method is 'generate', and {self.family.name} chooses among the answers of its list; accepted: 'list'"
            )
        return self

    def model_of(self, stage: StageConfig) -> ModelConfig:
        """The model as a stage trains it: at the stage's resolution."""
        return (
            self.model if stage.image_size is None else self.model.model_copy(update={"image_size": stage.image_size})
        )


EVALUATIONS = tuple(  # sections of a recipe: what is measured on held-out shards
    name
    for name, field in Recipe.model_fields.items()
    if any(isinstance(part, type) and issubclass(part, HeldOutConfig) for part in get_args(field.annotation))
)


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


def nearest(word: str | int, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
