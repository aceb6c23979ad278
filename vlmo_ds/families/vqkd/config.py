"""Settings of the visual tokenizer: sizes of the published ones, what it is trained by."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlmo_ds.config import ModelConfig, StageConfig
from vlmo_ds.families.interface import Pixels, Task

# microsoft/unilm, beit2/modeling_vqkd.py: vqkd_encoder_base_decoder_{1,3}x768x12_{clip,dino}; 8,192 codes of width 32.
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "num_codes": 8192, "code_dim": 32, "teacher_dim": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vqkd_base_1_clip": {**BASE, "decoder_depth": 1},
    "vqkd_base_3_clip": {**BASE, "decoder_depth": 3},
    "vqkd_base_1_dino": {**BASE, "decoder_depth": 1, "teacher_dim": 768},
}
TASKS: dict[str, Task] = {"vqkd": Task(reads=frozenset({"image"}), gives=frozenset({"tokenize"}))}
TRAINABLE = {"all": ["*"]}
NO_DECAY = ("*.bias", "*_bias", "*norm*.weight", "*.cls_token", "*.pos_embed")
PIXELS = Pixels(0.5, 0.5)  # from -1 to 1, whatever its teacher takes
MOST_CODES = 1 << 16  # tokens are kept as uint16
DEAD = 0.01  # of the mean use of a code


class VQKDSettings(ModelConfig):
    """A visual tokenizer (VQ-KD, arXiv:2208.06366): encoder, codebook, decoder of a teacher's features. `arch` fills in the sizes of a
    published one; single settings may still differ."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES

    arch: Literal["custom", "vqkd_base_1_clip", "vqkd_base_3_clip", "vqkd_base_1_dino"] = Field(
        "custom", description="a published architecture, or custom"
    )
    family: Literal["vqkd"] = Field("vqkd", description="the family of models that a custom architecture is of")
    embed_dim: int = Field(192, gt=0, description="width of encoder and decoder")
    depth: int = Field(6, gt=0, description="blocks of the encoder")
    num_heads: int = Field(3, gt=0, description="attention heads of encoder and decoder; must divide embed_dim")
    num_codes: int = Field(256, gt=1, le=MOST_CODES, description="codes of the codebook")
    code_dim: int = Field(16, gt=0, description="width of a code")
    decoder_depth: int = Field(1, gt=0, description="blocks of the decoder")
    teacher: str = Field(
        "",
        description="whose features of patches are learnt: a finished run of this project (its image tower), or a vision model of transformers by "
        "name or folder (CLIP, SigLIP, DINO, ...)",
    )
    teacher_dim: int = Field(192, gt=0, description="width of the teacher's features of a patch")
    teacher_norm: Literal["none", "standard"] = Field(
        "none",
        description="the teacher's features as they are (the reference), or with mean 0 and variance 1 in every component by those of the first "
        "step: where most of a feature is the same in all patches, a few codes are enough for its direction, and the others are not used",
    )
    decay: float = Field(0.99, gt=0, lt=1, description="what stays of a code's place in a step")
    commitment: float = Field(1.0, ge=0, description="weight of the distance of features from their codes")
    replace_below: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="a code that is used less often than so many times the mean is replaced by a vector of the step's batch; 0: never (the "
        "reference)",
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the encoder's last block")
    init_std: float = Field(
        0.02, gt=0, le=10, description="std of initial weights; narrow models want more, about 1/sqrt(embed_dim)"
    )

    @model_validator(mode="after")
    def check_heads(self) -> VQKDSettings:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self

    def check_stage(self, stage: StageConfig) -> None:
        if not self.teacher:
            raise ValueError(
                "model.teacher is missing: name a finished run of this project, or a vision model of transformers"
            )

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size
