"""BEiT-3's settings: sizes of the published models, what its tasks ask, what a stage may train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlmo_ds.config import ClassSettings, ContrastSettings, ModelConfig, RecipeError, StageConfig, VisualTokenSettings
from vlmo_ds.families.interface import MATCHING, Pixels, Reads, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED = {"vocab_size": 64010, "max_source_positions": 1024, "num_visual_tokens": 8192}
# BEiT-3 (arXiv:2208.10442), table 2 and the released sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "beit3_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12, **PUBLISHED},
    "beit3_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, **PUBLISHED},
}

PAIR: frozenset[Reads] = frozenset({"image", "text"})
TASKS: dict[str, Task] = {
    "mim": Task(reads=frozenset({"image", "masked_image"}), gives=frozenset({"encode_patches"}), stream="images"),
    "textmlm": Task(reads=frozenset({"text", "masked_text"}), stream="texts"),
    "mvlm": Task(
        reads=frozenset({"image", "masked_image", "text", "masked_text"}), gives=frozenset({"encode_patches"})
    ),
    "itc": Task(
        reads=PAIR, gives=frozenset({"encode_patches", "encode_image", "encode_text"}), gradient_cache="features"
    ),
    "itm": Task(
        reads=PAIR,
        gives=frozenset({"match"}),
        needs={"itc": "draws its negatives from the similarities of 'itc'"},
        guess=MATCHING,
    ),
    "irtr": Task(
        reads=PAIR,
        gives=frozenset({"encode_patches", "encode_image", "encode_text"}),
        alone="has data of its own",
        gradient_cache="features",
    ),
    "vqa": Task(reads=frozenset({"image", "questions"}), gives=frozenset({"answer"}), alone="has data of its own"),
    "nlvr2": Task(reads=frozenset({"image_pair"}), gives=frozenset({"compare"}), alone="has data of its own"),
    "captioning": Task(reads=PAIR, gives=frozenset({"caption_step"}), alone="has data of its own"),
    "classification": Task(
        reads=frozenset({"image", "label"}), gives=frozenset({"classify"}), alone="has data of its own"
    ),
}

# What a stage trains, by name; a recipe may list its own patterns (fnmatch) instead.
TRAINABLE: dict[str, list[str]] = {
    "all": ["*"],
    "image_only": ["beit3.vision_embed.*", "beit3.encoder.*.A.*", "mim_head.*"],
    "text_only": ["beit3.text_embed.*", "beit3.encoder.*.B.*", "mlm_head.*"],
}
HEADS = ("head.*", "pooler.*", "fc_norm.*")  # what a fine-tuning task has of its own
NO_DECAY = (
    "*.bias",
    "*norm*.weight",
    "*_ln.?.weight",
    "head.1.weight",
    "*cls_token",
    "*mask_token",
    "*embed_positions.?.weight",
    "logit_scale",
    "logit_bias",
)
PIXELS = Pixels(0.5, 0.5)  # to [-1, 1]
WORDS = ("beit3.text_embed.weight", "mlm_head.weight", "mlm_head.bias")
UNUSED_POSITIONS = 2  # rows that tables of positions begin with


class BEiT3Settings(ModelConfig, ContrastSettings, VisualTokenSettings, ClassSettings):
    """BEiT-3's architecture (arXiv:2208.10442). `arch` fills in the sizes of a published model; single settings may still
    differ."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES

    arch: Literal["custom", "beit3_base_patch16", "beit3_large_patch16"] = Field(
        "custom", description="a published architecture, or custom"
    )
    family: Literal["beit3"] = Field("beit3", description="the family of models that a custom architecture is of")
    embed_dim: int = Field(192, gt=0, description="width D")
    depth: int = Field(6, gt=0, description="number of blocks")
    num_heads: int = Field(3, gt=0, description="attention heads; must divide embed_dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of an expert over D")
    max_source_positions: int = Field(
        128, gt=2, description="rows of the table of text positions, the first two of which are not used"
    )
    mask_word: int | None = Field(
        None, ge=0, description="id of the word that stands where one is hidden; null: the tokenizer's"
    )
    pair_views: Literal["two", "one"] = Field(
        "two",
        description="mvlm: two: a pair is seen once with masked text and whole image, and once with masked image and whole text; "
        "one: once, with both masked",
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    init_std: float = Field(
        0.02, gt=0, le=10, description="std of initial positions, class and mask tokens, patches and heads"
    )
    label_smoothing: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="captioning: share of a target that is spread over the other words; classification: over all classes",
    )
    caption_mask: float = Field(0.6, gt=0, lt=1, description="captioning: share of a caption's words that are hidden")

    @model_validator(mode="after")
    def check_sizes(self) -> BEiT3Settings:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves experts of embed_dim {self.embed_dim} no hidden unit")
        if (rows := self.max_text_len + UNUSED_POSITIONS) > self.max_source_positions:
            raise ValueError(
                f"max_source_positions is {self.max_source_positions}, and texts of max_text_len {self.max_text_len} need {rows}"
            )
        return self

    def take_words(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().take_words(tokenizer)
        if self.mask_word is None:
            self.mask_word = tokenizer.mask_token_id
        if self.mask_word != tokenizer.mask_token_id:
            raise RecipeError(
                f"model.mask_word is {self.mask_word}, and the tokenizer's mask word {tokenizer.mask_token_id}: take the tokenizer's (null)"
            )

    def check_stage(self, stage: StageConfig) -> None:
        self.check_tokens(stage)
        self.check_classes(stage)
        if "itm" in stage.tasks and stage.global_batch_size < 2:
            raise ValueError(
                f"stages.{stage.name}.global_batch_size is 1: itm needs the image of another pair; take 2 or more"
            )
