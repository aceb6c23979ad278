"""BLIP's settings: sizes of the published models, what its tasks ask, what a stage may train."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlmo_ds.config import ImageTowerConfig, StageConfig
from vlmo_ds.families.interface import MATCHING, Pixels, Reads, Task

BERT = {
    "text_width": 768,
    "text_layers": 12,
    "text_heads": 12,
    "text_hidden": 3072,
    "positions": 512,
    "max_text_len": 30,
}
# salesforce/BLIP, models/blip.py and configs/med_config.json (arXiv:2201.12086, section 4.1).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "blip_ViT-B-16": {"vision_width": 768, "vision_layers": 12, "vision_heads": 12, "embed_dim": 256, **BERT},
    "blip_ViT-L-16": {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "embed_dim": 256, **BERT},
}

PAIR: frozenset[Reads] = frozenset({"image", "text"})
TASKS: dict[str, Task] = {
    "itc": Task(reads=PAIR, gives=frozenset({"encode_patches", "encode_image", "encode_text"})),
    "itm": Task(
        reads=PAIR,
        gives=frozenset({"match"}),
        needs={"itc": "its wrong pairs are drawn from the contrastive similarities"},
        guess=MATCHING,
    ),
    "lm": Task(reads=PAIR, gives=frozenset({"caption_step"})),
    "vqa": Task(
        reads=frozenset({"image", "questions", "answers"}),
        gives=frozenset({"answer", "answer_step"}),
        alone="has data and a decoder of its own",
    ),
    "nlvr2": Task(reads=frozenset({"image_pair"}), gives=frozenset({"compare"}), alone="has data of its own"),
}

TRAINABLE: dict[str, list[str]] = {
    "all": ["*"],
    "image_only": ["visual_encoder.*", "vision_proj.*", "temp"],
    "text_only": ["text_encoder.*", "text_decoder.*", "text_proj.*", "itm_head.*", "cls_head.*", "temp"],
}
HEADS = ("cls_head.*",)  # what a fine-tuning task has of its own
NO_DECAY = (
    "*.bias",
    "*norm*.weight",
    "*.LayerNorm.weight",
    "*.cls_token",
    "*.pos_embed",
    "*position_embeddings.weight",
    "temp",
)
# What follows the weights of another part without a gradient: beginnings of names, teacher -> student.
AVERAGED = {
    "visual_encoder_m.": "visual_encoder.",
    "vision_proj_m.": "vision_proj.",
    "text_encoder_m.": "text_encoder.",
    "text_proj_m.": "text_proj.",
}
PIXELS = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's, as BLIP takes them
WORDS = (
    "text_encoder.embeddings.word_embeddings.weight",
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.bias",
)
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.001, 0.5


class BLIPSettings(ImageTowerConfig):
    """BLIP's architecture (arXiv:2201.12086), its teacher and its queue. `arch` fills in the sizes of a published model; single
    settings may still differ."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES
    extra_words: ClassVar[int] = 2

    arch: Literal["custom", "blip_ViT-B-16", "blip_ViT-L-16"] = Field(
        "custom", description="a published architecture, or custom"
    )
    family: Literal["blip"] = Field("blip", description="the family of models that a custom architecture is of")
    embed_dim: int = Field(64, gt=0, description="width of contrastive features")
    vision_heads: int = Field(3, gt=0, description="attention heads of the image tower")
    position_std: float = Field(
        0.02,
        gt=0,
        le=10,
        description="std of the image tower's initial positions; pictures of flat colour drown small ones: there a small model "
        "that is to say where things are wants about 1",
    )
    init_std: float = Field(
        0.02,
        gt=0,
        le=1,
        description="std of initial weights; a narrow model wants about width ** -0.5, or a text's first word does not see the others",
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the image tower's last block")
    text_width: int = Field(192, gt=0, description="width of the text stack")
    text_layers: int = Field(3, gt=0, description="layers of the text stack")
    text_heads: int = Field(3, gt=0, description="attention heads of the text stack")
    text_hidden: int = Field(768, gt=0, description="hidden width of the text stack's feed-forward layers")
    text_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the text stack, attention included")
    positions: int = Field(64, gt=0, description="rows of the table of text positions")
    queue_size: int = Field(
        57600, gt=0, description="teacher's features of earlier batches that contrast looks at as well"
    )
    queue_init: Literal["empty", "random"] = Field(
        "empty", description="what stands in the queue before it is full: nothing, or random features (the reference)"
    )
    queue_warmup_steps: int = Field(
        0,
        ge=0,
        description="steps of a stage in which contrast does not look at the queue; while features move quickly its keys are known by "
        "their age, and nothing else is learnt",
    )
    momentum: float = Field(0.995, ge=0, le=1, description="what of the teacher stays in a step")
    alpha: float = Field(0.4, ge=0, le=1, description="weight of the teacher's opinion in the targets of contrast")
    alpha_warmup_steps: int = Field(0, ge=0, description="steps in which alpha grows from 0 to its value")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of the captions' words")

    @model_validator(mode="after")
    def check_sizes(self) -> BLIPSettings:
        for heads, width in (("vision_heads", "vision_width"), ("text_heads", "text_width")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{heads} is {getattr(self, heads)}, which does not divide {width} {getattr(self, width)}"
                )
        if self.max_text_len > self.positions:
            raise ValueError(f"max_text_len is {self.max_text_len}, above the {self.positions} rows of positions")
        return self

    def check_stage(self, stage: StageConfig) -> None:
        if "itc" in stage.tasks and stage.global_batch_size > self.queue_size:
            raise ValueError(
                f"queue_size is {self.queue_size}, and stages.{stage.name}.global_batch_size {stage.global_batch_size}: the queue has to "
                "hold a batch; take more, or a smaller batch"
            )
        if "itm" in stage.tasks and stage.global_batch_size < 2:
            raise ValueError(
                f"stages.{stage.name}.global_batch_size is 1: itm needs the image of another pair; take 2 or more"
            )

    @property
    def decode_word(self) -> int:
        """[DEC], with which a text to be written begins; the tokenizer's words are below."""
        return self.vocab_size - 2

    @property
    def encode_word(self) -> int:
        """[ENC], with which a text begins whose image it is matched with."""
        return self.vocab_size - 1
