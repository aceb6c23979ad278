"""CoCa's settings: sizes of the published models, what its tasks ask, what a stage may train."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlmo_ds.config import ContrastSettings, ImageTowerConfig
from vlmo_ds.families.interface import Pixels, Task


def text_stacks(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Settings of a text tower and a decoder of the same size, for CLIP's length of texts with a class token after it."""
    tower = {"text_width": width, "text_layers": layers, "text_heads": heads, "max_text_len": 76}
    return tower | {"decoder_layers": layers, "decoder_heads": heads}


PAPER = {"image_size": 288, "patch_size": 18, "attentional_pool": "cascade", "class_mask": "correct"}
# open_clip's configurations (mlfoundations/open_clip, model_configs/coca_*.json), and the paper's (arXiv:2205.01917, table 1).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "coca_ViT-B-32": {
        "embed_dim": 512,
        "vision_width": 768,
        "vision_layers": 12,
        "patch_size": 32,
        **text_stacks(512, 12, 8),
    },
    "coca_ViT-L-14": {
        "embed_dim": 768,
        "vision_width": 1024,
        "vision_layers": 24,
        "patch_size": 14,
        **text_stacks(768, 12, 12),
    },
    "coca_base": {
        "embed_dim": 512,
        "image_size": 288,
        "patch_size": 18,
        "vision_width": 768,
        "vision_layers": 12,
        "attentional_pool": "none",
        **text_stacks(768, 12, 12),
    },
    "coca_paper_base": {
        "embed_dim": 768,
        "vision_width": 768,
        "vision_layers": 12,
        **PAPER,
        **text_stacks(768, 12, 12),
    },
    "coca_paper_large": {
        "embed_dim": 1024,
        "vision_width": 1024,
        "vision_layers": 24,
        **PAPER,
        **text_stacks(1024, 12, 16),
    },
    "coca_paper_2b": {
        "embed_dim": 1408,
        "vision_width": 1408,
        "vision_layers": 40,
        "vision_head_width": 88,
        "vision_mlp_ratio": 4.3637,  # 6144 hidden units
        **PAPER,
        **text_stacks(1408, 18, 16),
    },
}

TASKS: dict[str, Task] = {
    "itc": Task(
        reads=frozenset({"image", "text"}),
        gives=frozenset({"encode_patches", "encode_image", "encode_text"}),
        gradient_cache="features",
    ),
    "caption": Task(
        reads=frozenset({"image", "text"}),
        gives=frozenset({"encode_patches", "caption_step"}),
        weight=2.0,
        gradient_cache="beside",
    ),
}

TRAINABLE: dict[str, list[str]] = {
    "all": ["*"],
    # As locked-text tuning: the text tower and the decoder stay.
    "image_only": ["visual.*", "logit_scale", "logit_bias"],
    "text_only": ["text.*", "text_decoder.*", "logit_scale", "logit_bias"],
}
NO_DECAY = (
    "*.bias",
    "*_bias",
    "*ln_*.weight",
    "*positional_embedding",
    "*class_embedding",
    "*cls_emb",
    "*.query",
    "logit_scale",
    "logit_bias",
)
PIXELS = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's
WORDS = ("text.token_embedding.weight", "text_decoder.text_projection")


class CoCaSettings(ImageTowerConfig, ContrastSettings):
    """CoCa's architecture (arXiv:2205.01917) as open_clip names it. `arch` fills in the sizes of a published model; single
    settings may still differ."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES

    arch: Literal[
        "custom",
        "coca_ViT-B-32",
        "coca_ViT-L-14",
        "coca_base",
        "coca_paper_base",
        "coca_paper_large",
        "coca_paper_2b",
    ] = Field("custom", description="a published architecture, or custom")
    family: Literal["coca"] = Field("coca", description="the family of models that a custom architecture is of")
    embed_dim: int = Field(192, gt=0, description="width of contrastive features, and of what the poolers give")
    vision_head_width: int = Field(64, gt=0, description="width of one attention head of the image tower")
    vision_mlp_ratio: float = Field(
        4.0, gt=0, description="hidden width of the image tower's feed-forward layers over its width"
    )
    position_std: float | None = Field(
        None,
        gt=0,
        le=10,
        description="std of the image tower's initial positions; null: vision_width ** -0.5 (CLIP), which pictures of flat "
        "colour drown: there a small model that is to say where things are wants about 1",
    )
    attentional_pool: Literal["single", "cascade", "parallel", "none"] = Field(
        "single",
        description="single: query 0 is the image's feature, the others are caption tokens (released models); cascade: a "
        "second pooler reads the caption tokens (the paper); parallel: a second pooler reads the image tower; none: the "
        "class token is the feature, the patches are the caption tokens",
    )
    pooler_queries: int = Field(256, gt=0, description="queries of the attentional pooler")
    pooler_heads: int = Field(8, gt=0, description="attention heads of the attentional poolers")
    text_width: int = Field(192, gt=0, description="width of the text tower and the decoder")
    text_layers: int = Field(3, gt=0, description="blocks of the text tower")
    text_heads: int = Field(3, gt=0, description="attention heads of the text tower")
    decoder_layers: int = Field(3, gt=0, description="pairs of blocks of the multimodal decoder")
    decoder_heads: int = Field(3, gt=0, description="attention heads of the multimodal decoder")
    mlp_ratio: float = Field(
        4.0, gt=0, description="hidden width of the text layers' feed-forward layers over their width"
    )
    max_text_len: int = Field(76, gt=2, description="longest text in tokens, start and end included")
    class_mask: Literal["legacy", "correct"] = Field(
        "legacy",
        description="what the text's class token sees: legacy (released models): the words and the first padding place; "
        "correct: the words and itself",
    )

    @model_validator(mode="after")
    def check_sizes(self) -> CoCaSettings:
        for what, width, heads, of in (
            ("vision_head_width", self.vision_width, self.vision_width // self.vision_head_width, "vision_width"),
            ("pooler_heads", self.embed_dim, self.pooler_heads, "embed_dim"),
            ("text_heads", self.text_width, self.text_heads, "text_width"),
            ("decoder_heads", self.text_width, self.decoder_heads, "text_width"),
        ):
            if what == "pooler_heads" and self.attentional_pool == "none":
                continue
            if not heads or width % heads or (what == "vision_head_width" and width % self.vision_head_width):
                raise ValueError(f"{what} is {getattr(self, what)}, which does not divide {of} {width} into heads")
        if self.token_width != self.text_width:
            of = "vision_width" if self.attentional_pool == "none" else "embed_dim"
            raise ValueError(
                f"text_width is {self.text_width} and {of} {self.token_width}: the decoder attends to caption tokens of its "
                "own width; take the same for both"
            )
        if self.attentional_pool == "single" and self.pooler_queries < 2:
            raise ValueError(
                f"pooler_queries is {self.pooler_queries}; with attentional_pool 'single' one of them is the image's feature "
                "and the others are caption tokens: accepted are 2 and more"
            )
        return self

    @property
    def token_width(self) -> int:
        """Of the caption tokens."""
        return self.vision_width if self.attentional_pool == "none" else self.embed_dim

    @property
    def caption_tokens(self) -> int:
        """Of one image."""
        if self.attentional_pool == "none":
            return self.patches
        return self.pooler_queries - (self.attentional_pool == "single")
