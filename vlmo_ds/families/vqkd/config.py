"""Settings of the visual tokenizer: sizes of the published ones, what it is trained by."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from vlmo_ds.config import ModelConfig
from vlmo_ds.families.interface import Pixels

# microsoft/unilm, beit2/modeling_vqkd.py: vqkd_encoder_base_decoder_{1,3}x768x12_{clip,dino}; 8,192 codes of width 32.
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "num_codes": 8192, "code_dim": 32, "teacher_dim": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vqkd_base_1_clip": {**BASE, "decoder_depth": 1},
    "vqkd_base_3_clip": {**BASE, "decoder_depth": 3},
    "vqkd_base_1_dino": {**BASE, "decoder_depth": 1, "teacher_dim": 768},
}
PIXELS = Pixels(0.5, 0.5)  # from -1 to 1, whatever its teacher takes
MOST_CODES = 1 << 16  # tokens are kept as uint16


class VQKDSettings(ModelConfig):
    """A visual tokenizer (VQ-KD): encoder, codebook, decoder of a teacher's features."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = ARCHITECTURES

    embed_dim: int = Field(192, gt=0, description="width of encoder and decoder")
    depth: int = Field(6, gt=0, description="blocks of the encoder")
    num_heads: int = Field(3, gt=0, description="attention heads of encoder and decoder; must divide embed_dim")
    num_codes: int = Field(256, gt=1, le=MOST_CODES, description="codes of the codebook")
    code_dim: int = Field(16, gt=0, description="width of a code")
    decoder_depth: int = Field(1, gt=0, description="blocks of the decoder")
    teacher_dim: int = Field(192, gt=0, description="width of the teacher's features of a patch")
    decay: float = Field(0.99, gt=0, lt=1, description="what stays of a code's place in a step")
    commitment: float = Field(1.0, ge=0, description="weight of the distance of features from their codes")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the encoder's last block")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @model_validator(mode="after")
    def check_heads(self) -> VQKDSettings:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self
