"""CoCa as Hugging Face models: importing this module makes them known to the Auto classes.

    import vlmo_ds.interop.huggingface  # the classes of every family
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    texts = processor.tokenizer.batch_decode(model.generate(**processor(images=image)), skip_special_tokens=True)

FOLDER is what `python -m vlmo_ds.interop.export` writes. `generate` here is transformers' own, which computes every word anew;
vlmo_ds.generation keeps keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from vlmo_ds.families.coca.config import PIXELS, CoCaSettings
from vlmo_ds.families.coca.model import CoCa
from vlmo_ds.families.huggingface import FamilyConfig, PairProcessor, SquareImageProcessor, fill, write


class CoCaConfig(FamilyConfig):
    """CoCaSettings' values."""

    model_type = "coca"
    attribute_map = {
        "hidden_size": "text_width",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_heads",
    }
    settings_class = CoCaSettings


@dataclasses.dataclass
class CoCaOutput(ModelOutput):
    """logits [B, L, V] of the word after each; image_tokens [B, S, D], which may be given in place of the image."""

    logits: Tensor | None = None
    image_tokens: Tensor | None = None


class CoCaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Contrastive features and captions. The network is `coca`, with open_clip's parameter names."""

    config_class = CoCaConfig
    base_model_prefix = "coca"
    main_input_name = "input_ids"

    def __init__(self, config: CoCaConfig):
        super().__init__(config)
        self.coca = CoCa(config.settings, {"itc": 1.0, "caption": 2.0})
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self:
            self.coca.reset_parameters()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, E], of unit length."""
        return self.coca.encode_image({"image": pixel_values})["image"]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] -> [B, E], of unit length. A mask is needed: no id is padding alone."""
        return self.coca.encode_text({"text_ids": input_ids, "text_masks": attention_mask.long()})["text"]

    @property
    def contrast_scale(self) -> float:
        """What cosines of image and text features are multiplied with."""
        return float(self.coca.contrast_scale())

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> caption tokens [B, S, D]."""
        return self.coca.visual(self.coca.pixels({"image": pixel_values}))[1]

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CoCaOutput:
        """input_ids [B, L], attention_mask [B, L] (None: no padding), and pixel_values [B, 3, S, S] or image_tokens."""
        if image_tokens is None:
            if pixel_values is None:
                raise ValueError("CoCa needs pixel_values or image_tokens")
            image_tokens = self.image_tokens(pixel_values)
        lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1])
        if attention_mask is not None:
            lengths = attention_mask.long().sum(1)
        text, decoder = self.coca.text(input_ids, lengths, feature=False), self.coca.text_decoder
        hidden = text.fold.padded(decoder.hidden(text.tokens_ND, text.fold, image_tokens))
        return CoCaOutput(hidden @ decoder.text_projection, image_tokens)

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Texts for images [B, 3, S, S] by transformers' generate, with its settings; input_ids [B, L]: how they begin, of one
        length, without or with the end word (None: with the start word)."""
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("prompts of different lengths: generate for those of one length at a time")
        if input_ids is None:
            start = self.generation_config.bos_token_id
            input_ids = torch.full((len(pixel_values), 1), start, device=pixel_values.device)
        if input_ids.shape[1] > 1 and bool((input_ids[:, -1] == self.generation_config.eos_token_id).all()):
            input_ids = input_ids[:, :-1]
        kwargs |= {"use_cache": False, "image_tokens": self.image_tokens(pixel_values)}
        return super().generate(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, image_tokens: Tensor | None = None, **kwargs: Any
    ) -> dict:
        return {"input_ids": input_ids, "image_tokens": image_tokens}


class CoCaImageProcessor(SquareImageProcessor):
    """Of values normalised as CLIP's."""

    normalised_by = PIXELS


class CoCaProcessor(PairProcessor):
    """CoCa's."""


def exported(
    weights: Mapping[str, Tensor],
    settings: CoCaSettings,
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str] | None,
    folder: Path,
) -> CoCaForConditionalGeneration:
    """Writes the folder in one rename."""
    model = CoCaForConditionalGeneration(CoCaConfig(tasks=list(tasks), **settings.model_dump())).eval()
    fill(model.coca, weights)
    start, *_, end = tokenizer("")["input_ids"]
    model.generation_config = GenerationConfig(
        bos_token_id=start, eos_token_id=end, pad_token_id=end, max_length=settings.max_text_len
    )
    processor = CoCaProcessor(CoCaImageProcessor(size=settings.image_size), tokenizer, settings.max_text_len)
    write(folder, model, processor)
    return model


AutoConfig.register(CoCaConfig.model_type, CoCaConfig)
AutoModel.register(CoCaConfig, CoCaForConditionalGeneration)
AutoModelForImageTextToText.register(CoCaConfig, CoCaForConditionalGeneration)
AutoModelForZeroShotImageClassification.register(CoCaConfig, CoCaForConditionalGeneration)
AutoImageProcessor.register(CoCaConfig, CoCaImageProcessor)
AutoProcessor.register(CoCaConfig, CoCaProcessor)
