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
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmo_ds.blocks.layers import init_weights
from vlmo_ds.families.huggingface import (
    ClassificationOutput,
    FamilyConfig,
    PairProcessor,
    RetrievalOutput,
    SquareImageProcessor,
    appearing,
    fill,
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


class VLMoPreTrainedModel(PreTrainedModel):
    """All classes keep the network under the name `vlmo`, with its official parameter names."""

    config_class = VLMoConfig
    base_model_prefix = "vlmo"
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"vlmo\..*"]  # heads that a class does not have

    def __init__(self, config: VLMoConfig, tasks: Sequence[str]):
        super().__init__(config)
        self.vlmo = VLMo(config.settings, dict.fromkeys(tasks, 1.0))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        init_weights(module, self.config.init_std)

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


class VLMoForImageTextRetrieval(VLMoPreTrainedModel):
    """Contrastive features, and where the weights have it the head that scores pairs (`match`)."""

    def __init__(self, config: VLMoConfig):
        super().__init__(config, [task for task in config.tasks if task in RETRIEVAL] or ["irtr"])

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, D], of unit length."""
        return self.vlmo.encode_image({"image": pixel_values})["image"]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, L] -> [B, D], of unit length."""
        return self.vlmo.encode_text(self.texts(input_ids, attention_mask))["text"]

    @property
    def contrast_scale(self) -> float:
        """What cosines of image and text features are multiplied with."""
        return float(self.vlmo.contrast_scale())

    def match(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B] log-odds that each text fits its image. ValueError without an itm head."""
        if "itm" not in self.vlmo.tasks:
            raise ValueError(f"this model has no itm head; it was trained for {', '.join(self.config.tasks)}")
        return self.vlmo.match({**self.texts(input_ids, attention_mask), "image": pixel_values})

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> RetrievalOutput:
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        logits = self.vlmo.logit_scale.exp() * image @ text.t()
        if self.vlmo.logit_bias is not None:  # of SigLIP's loss, by which a logit is the log-odds of a pair
            logits = logits + self.vlmo.logit_bias
        return RetrievalOutput(logits, logits.t(), image, text)


class VLMoForClassification(VLMoPreTrainedModel):
    """What the two classifiers share. Subclasses: their logits and their loss."""

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> ClassificationOutput:
        """input_ids, attention_mask [B, L]; pixel_values, logits and labels as the class says."""
        logits = self.logits(self.texts(input_ids, attention_mask), pixel_values)
        return ClassificationOutput(None if labels is None else self.loss(logits, labels), logits)

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class VLMoForQuestionAnswering(VLMoForClassification):
    """Logits [B, answers] over a fixed list of answers, config.id2label, from pixel_values [B, 3, S, S].

    labels [B, answers]: soft targets in [0, 1]; the loss is summed over the answers.
    """

    def __init__(self, config: VLMoConfig):
        super().__init__(config, ["vqa"])

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        return self.vlmo.answer({**texts, "image": pixel_values})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)


class VLMoForImagesAndTextClassification(VLMoForClassification):
    """Is a sentence true of two images? Logits [B, 2], index 1 = true, from pixel_values [B, 2, 3, S, S].

    labels [B] int64.
    """

    def __init__(self, config: VLMoConfig):
        super().__init__(config, ["nlvr2"])

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; accepted: [B, 2, 3, S, S], two images a text"
            )
        return self.vlmo.compare({**texts, "image_0": pixel_values[:, 0], "image_1": pixel_values[:, 1]})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


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
    if answers:
        config.id2label = dict(enumerate(answers))
        config.label2id = {answer: number for number, answer in enumerate(answers)}
    model = class_for(tasks)(config).eval()
    fill(model.vlmo, weights)
    processor = VLMoProcessor(VLMoImageProcessor(size=settings.image_size), tokenizer, settings.max_text_len)
    with appearing(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return model


AutoConfig.register(VLMoConfig.model_type, VLMoConfig)
AutoModel.register(VLMoConfig, VLMoModel)
AutoModelForVisualQuestionAnswering.register(VLMoConfig, VLMoForQuestionAnswering)
AutoModelForZeroShotImageClassification.register(VLMoConfig, VLMoForImageTextRetrieval)
AutoImageProcessor.register(VLMoConfig, VLMoImageProcessor)
AutoProcessor.register(VLMoConfig, VLMoProcessor)
