"""VLMo's settings: sizes of the published models, what its tasks ask, what a stage may train."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlmo_ds.config import ContrastSettings, InitConfig, ModelConfig, StageConfig, VisualTokenSettings
from vlmo_ds.families.interface import MATCHING, Pixels, Task

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
TASKS: dict[str, Task] = {
    "mim": Task(
        reads=frozenset({"image", "masked_image"}), gives=frozenset({"encode_patches"}), alone="trains on one modality"
    ),
    "textmlm": Task(reads=frozenset({"text", "masked_text"}), alone="trains on one modality"),
    "mlm": Task(reads=frozenset({"image", "text", "masked_text"}), weight=0.25),
    "itc": Task(
        reads=frozenset({"image", "text"}),
        gives=frozenset({"encode_patches", "encode_image", "encode_text"}),
        gradient_cache="features",
    ),
    "itm": Task(
        reads=frozenset({"image", "text"}),
        gives=frozenset({"match"}),
        needs={"itc": "draws its negatives from the similarities of 'itc'"},
        guess=MATCHING,
    ),
    "irtr": Task(
        reads=frozenset({"image", "text"}),
        gives=frozenset({"encode_patches", "encode_image", "encode_text"}),
        alone="has data of its own",
        gradient_cache="features",
    ),
    "vqa": Task(reads=frozenset({"image", "questions"}), gives=frozenset({"answer"}), alone="has data of its own"),
    "nlvr2": Task(reads=frozenset({"image_pair"}), gives=frozenset({"compare"}), alone="has data of its own"),
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
        "mim_aggregation.*",
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
HEADS = ("vqa_classifier.*", "nlvr2_classifier.*")  # the reference multiplies their learning rate alone
NO_DECAY = (
    "*.bias",
    "*_bias",
    "*norm*.weight",
    "*LayerNorm.weight",
    "*_classifier.1.weight",
    "*.gamma_?",
    "*cls_token",
    "*mask_token",
    "*pos_embed",
    "*position_embeddings.weight",
    "*token_type_embeddings.weight",
    "relative_position_bias_table",
    "logit_scale",
    "logit_vl_scale",
    "logit_bias",
    "logit_vl_bias",
)
PIXELS = Pixels(0.5, 0.5)  # to [-1, 1]
WORDS = ("text_embeddings.word_embeddings.weight", "mlm_score.decoder.weight", "mlm_score.bias")


class VLMoSettings(ModelConfig, ContrastSettings, VisualTokenSettings):
    """VLMo's architecture (arXiv:2111.02358). `arch` fills in the sizes of a published model; single settings may still
    differ."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES

    arch: Literal["custom", "vlmo_base_patch16", "vlmo_base_plus_patch16", "vlmo_large_patch16"] = Field(
        "custom", description="a published architecture, or custom"
    )
    family: Literal["vlmo"] = Field("vlmo", description="the family of models that a custom architecture is of")
    embed_dim: int = Field(192, gt=0, description="width D")
    depth: int = Field(6, gt=0, description="number of blocks")
    num_heads: int = Field(3, gt=0, description="attention heads; must divide embed_dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of an expert over D")
    vlffn_start_layer_index: int = Field(5, gt=0, description="first block with a vision-language expert")
    max_text_len_of_initckpt: int = Field(196, gt=2, description="text length the relative table has rows for")
    use_abs_pos_emb: bool = Field(False, description="absolute image positions")
    need_relative_position_embed: bool = Field(True, description="relative position bias; else absolute text positions")
    layer_scale_init_values: float | None = Field(0.1, gt=0, description="initial LayerScale; null: no LayerScale")
    init_std: float = Field(
        0.02, gt=0, le=10, description="std of initial weights; narrow models want more, about 1/sqrt(embed_dim)"
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    text_dropout: float | None = Field(None, ge=0, lt=1, description="dropout of text embeddings; null: drop_path_rate")
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the patches that contrast leaves out, other ones each step (FLIP)"
    )
    mim_visible_only: bool = Field(
        False,
        description="mim: the blocks see no masked patches, a block of the head predicts these from the others (MAE)",
    )
    mim_target: Literal["pixels", "tokens"] = Field(
        "pixels",
        description="mim: what masked patches are predicted as: their pixels (MAE), or their visual tokens (BEiT), which the paper has",
    )
    mim_early_layer: int = Field(
        0,
        ge=0,
        description="mim of tokens: they are also told from the class token and the patches of this block, through blocks of their own (BEiT v2's "
        "patch aggregation: 9 of 12 blocks); 0: not",
    )
    mim_head_layers: int = Field(2, gt=0, description="blocks of the patch aggregation")
    attention: Literal["auto", "sdpa", "explicit"] = Field(
        "auto", description="auto: torch's kernel on GPUs, written out on CPUs"
    )

    @model_validator(mode="after")
    def check_sizes(self) -> VLMoSettings:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.mim_visible_only and self.embed_dim % 4:
            raise ValueError(f"mim_visible_only needs an embed_dim that is a multiple of 4, this is {self.embed_dim}")
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

    @model_validator(mode="after")
    def check_target(self) -> VLMoSettings:
        if self.mim_early_layer >= self.depth:
            raise ValueError(
                f"mim_early_layer is {self.mim_early_layer}, the model has {self.depth} blocks: take 1 to {self.depth - 1}, or 0"
            )
        if self.mim_early_layer and (self.mim_target == "pixels" or self.mim_visible_only):
            other = (
                "mim_target is pixels" if self.mim_target == "pixels" else "mim_visible_only leaves masked patches out"
            )
            raise ValueError(
                f"mim_early_layer is {self.mim_early_layer}, and {other}: it is for tokens of patches that are seen masked"
            )
        return self

    def check_stage(self, stage: StageConfig) -> None:
        if "mim" not in stage.tasks:
            return
        if self.mim_target == "tokens":
            self.check_tokens(stage)
        if self.mim_target == "pixels" and stage.data.has_visual_tokens:
            raise ValueError(
                f"stages.{stage.name}.data.visual_tokens is given, and mim_target is pixels; accepted: tokens"
            )

    @property
    def patches_of_contrast(self) -> int:
        """How many of an image's patches contrast sees in training."""
        return max(1, round((1 - self.patch_dropout) * self.patches))

    @property
    def text_dropout_rate(self) -> float:
        return self.drop_path_rate if self.text_dropout is None else self.text_dropout


class VLMoInit(InitConfig):
    __doc__ = InitConfig.__doc__

    max_text_len_of_initckpt: int | None = Field(
        None, gt=2, description="text length that the source's relative table has rows for; null: the model's"
    )
    vl_experts: Literal["keep", "fresh", "text", "image"] = Field(
        "keep", description="VL experts: as in the source, fresh, or copies of the text or image experts"
    )
