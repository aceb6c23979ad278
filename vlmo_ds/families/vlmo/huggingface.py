"""VLMo as Hugging Face models: importing this module makes them known to the Auto classes.

    import vlmo_ds.interop.huggingface  # the classes of every family
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)

FOLDER is what `python -m vlmo_ds.interop.export` writes. Neither DeepSpeed nor a process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmo_ds.families.huggingface import (
    AnswerClassifier,
    FamilyConfig,
    ImagePairClassifier,
    PairModel,
    PairProcessor,
    RetrievalModel,
    SquareImageProcessor,
    fill,
    name_answers,
    write,
)
from vlmo_ds.families.vlmo.config import PIXELS, VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.families.vlmo.multiway import Stream

RETRIEVAL = ("itc", "itm", "irtr")


class VLMoConfig(FamilyConfig):
    """VLMoSettings' values; id2label: VQA's answers."""

    model_type = "vlmo"
    attribute_map = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    settings_class = VLMoSettings


class VLMoPreTrainedModel(PairModel):
    """All classes keep the network under the name `vlmo`, with its official parameter names."""

    config_class = VLMoConfig
    base_model_prefix = "vlmo"
    _keys_to_ignore_on_load_unexpected = [r"vlmo\..*"]  # heads that a class does not have

    def __init__(self, config: VLMoConfig, tasks: Sequence[str]):
        super().__init__(config)
        self.vlmo = VLMo(config.settings, dict.fromkeys(tasks, 1.0))
        self.post_init()

    def texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask.long()
        return {"text_ids": input_ids, "text_masks": mask}


class VLMoModel(VLMoPreTrainedModel):
    """The encoder: of a text, an image, or a text with an image (fused by the vision-language experts)."""

    def __init__(self, config: VLMoConfig):
        super().__init__(config, ())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """input_ids, attention_mask [B, L] and pixel_values [B, 3, S, S] -> last_hidden_state [B, text and image tokens,
        D], text first; pooler_output [B, D]."""
        if input_ids is None and pixel_values is None:
            raise ValueError("VLMoModel needs input_ids, pixel_values or both")
        types, text, mask, rows = self.vlmo.token_types(), None, None, None
        if input_ids is not None:
            batch = self.texts(input_ids, attention_mask)
            text, mask = self.vlmo.embed_texts({"text": batch["text_ids"]}, types)["text"], batch["text_masks"]
        if pixel_values is not None:
            rows = torch.arange(len(pixel_values), device=pixel_values.device)
        encoded = self.vlmo.encode({"inputs": Stream(text, mask, rows)}, pixel_values, types[1])["inputs"].tokens_BLD
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=self.vlmo.pooler(encoded[:, 0]))


class VLMoForImageTextRetrieval(VLMoPreTrainedModel, RetrievalModel):
    __doc__ = RetrievalModel.__doc__

    def __init__(self, config: VLMoConfig):
        super().__init__(config, [task for task in config.tasks if task in RETRIEVAL] or ["irtr"])


class VLMoForQuestionAnswering(VLMoPreTrainedModel, AnswerClassifier):
    __doc__ = AnswerClassifier.__doc__

    def __init__(self, config: VLMoConfig):
        super().__init__(config, ["vqa"])


class VLMoForImagesAndTextClassification(VLMoPreTrainedModel, ImagePairClassifier):
    __doc__ = ImagePairClassifier.__doc__

    def __init__(self, config: VLMoConfig):
        super().__init__(config, ["nlvr2"])


class VLMoImageProcessor(SquareImageProcessor):
    """Of values in [-1, 1]."""

    normalised_by = PIXELS


class VLMoProcessor(PairProcessor):
    """VLMo's."""


def class_for(tasks: Collection[str]) -> Callable[[VLMoConfig], VLMoPreTrainedModel]:
    if "vqa" in tasks:
        return VLMoForQuestionAnswering
    if "nlvr2" in tasks:
        return VLMoForImagesAndTextClassification
    return VLMoForImageTextRetrieval if set(tasks) & set(RETRIEVAL) else VLMoModel


def exported(
    weights: Mapping[str, Tensor],
    settings: VLMoSettings,
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str] | None,
    folder: Path,
) -> VLMoPreTrainedModel:
    """Writes the folder in one rename. Weights that no class has (of mlm, mim) are left out."""
    config = VLMoConfig(tasks=list(tasks), **settings.model_dump())
    name_answers(config, answers)
    model = class_for(tasks)(config).eval()
    fill(model.vlmo, weights)
    processor = VLMoProcessor(VLMoImageProcessor(size=settings.image_size), tokenizer, settings.max_text_len)
    write(folder, model, processor)
    return model


AutoConfig.register(VLMoConfig.model_type, VLMoConfig)
AutoModel.register(VLMoConfig, VLMoModel)
AutoModelForVisualQuestionAnswering.register(VLMoConfig, VLMoForQuestionAnswering)
AutoModelForZeroShotImageClassification.register(VLMoConfig, VLMoForImageTextRetrieval)
AutoImageProcessor.register(VLMoConfig, VLMoImageProcessor)
AutoProcessor.register(VLMoConfig, VLMoProcessor)
